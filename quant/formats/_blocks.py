"""What the block-scaled formats share: sizes of the swizzled scales.

Scales are stored in blocks of 128 rows by 4 columns of scales, 512 bytes each, the order that
cuBLAS wants ("32×4×4"); rows are padded to 128 and columns of scales to 4.
"""

import torch

ROWS = 128
COLUMNS = 4


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
