"""What the block-scaled formats share: sizes of the swizzled scales, and which kind they are.

Scales are stored in blocks of 128 rows by 4 columns of scales, 512 bytes each, the order that
cuBLAS wants ("32×4×4"); rows are padded to 128 and columns of scales to 4.
"""

from collections.abc import Mapping

import torch

ROWS = 128
COLUMNS = 4
# The two kinds of block scales, by the elements that share one.
KINDS = {
    16: "NVFP4's: E4M3, one per 16, and a float32 weight_scale_2 for the tensor",
    32: "those of MX formats: a power of two (E8M0), one per 32, and none for the tensor",
}
DTYPES = {16: torch.float8_e4m3fn, 32: torch.float8_e8m0fnu}


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def misfit(shape: tuple[int, int], scale: torch.Tensor, group: int) -> str | None:
    """Return why swizzled scales do not fit a weight of `shape` [N, K] with `group` per scale."""
    n, k = shape
    want = round_up(n, ROWS) * round_up(-(-k // group), COLUMNS)
    if scale.numel() == want:
        return None
    return (
        f"weight_scale has {scale.numel()} elements, {want} are wanted for [{n}, {k}] with one "
        f"scale per {group}"
    )


def _has_shape(scale: torch.Tensor, shape: tuple[int, int], group: int) -> bool:
    rows = round_up(shape[0], ROWS)
    return not misfit(shape, scale, group) and (scale.dim() != 2 or scale.shape[0] == rows)


def mixed(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], group: int) -> str | None:
    """Return how the scales show that they are of the other kind than `group` asks for, or None.

    tensors: of a layer, by name. shape: [N, K] as stored, unpacked.
    """
    scale = tensors.get("weight_scale")
    if scale is None:
        return None
    (other,) = KINDS.keys() - {group}
    shown = None
    if scale.dtype == DTYPES[other]:
        shown = f"weight_scale is {scale.dtype}"
    elif group == 32 and "weight_scale_2" in tensors:
        shown = "weight_scale_2 is there"
    elif scale.dtype != DTYPES[group] and (
        _has_shape(scale, shape, other) and not _has_shape(scale, shape, group)
    ):
        # Plain bytes do not tell their kind, but their number does unless it is that of both.
        shown = f"weight_scale has {scale.numel()} elements"
    if shown is None:
        return None
    return (
        f"{shown}: the scales are {KINDS[other]}; the format wants {KINDS[group]}. The two do not "
        "mix: correct the marking, or quantize the 16-bit file again"
    )
