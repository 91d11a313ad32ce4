"""4-bit weights as they lie in memory, and the 8-bit matrices that W4A8 makes of them."""

from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .. import registry
from ..decode_fp4 import MXFP4_GROUP, NVFP4_GROUP, decode_fp4, decode_fp4_e4m3
from ..quantize_rows import ROTATION, quantize_rows

GROUPS = {"nvfp4": NVFP4_GROUP, "mxfp4": MXFP4_GROUP}
FIRST_WITH_FP8 = (8, 9)
# W4A8 in 8 bits of one kind, whatever the GPU has: backends of `linear` -> the dtype.
W4A8_FP8, W4A8_INT8 = "w4a8_fp8", "w4a8_int8"
EIGHT_BITS = {W4A8_FP8: torch.float8_e4m3fn, W4A8_INT8: torch.int8}
# So many tokens are multiplied in 16 bits by a kernel that decodes the weight, beyond them in 8
# bits: so it was the fastest on an H200.
FEW_ROWS = 64


@dataclass(frozen=True)
class FourBit:
    """The tensors of a 4-bit weight of `shape` [N, K], as `decode_fp4` takes them."""

    packed: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor | None
    shape: tuple[int, int]
    group: int


def four_bit(weight: QuantizedTensor) -> FourBit:
    """Return the tensors of a weight whose scheme is one of GROUPS."""
    scheme, params = weight.layout_cls.scheme, weight._params
    packed, shape = weight._qdata.contiguous(), tuple(weight.shape)
    if scheme == "nvfp4":
        scale = params.block_scale.contiguous()
        return FourBit(packed, scale, params.scale, shape, GROUPS[scheme])
    return FourBit(packed, params.scale.contiguous(), None, shape, GROUPS[scheme])


def has_fp8(device: torch.device) -> bool:
    """Return whether W4A8 multiplies in FP8 on `device`: on a GPU that has it, and on the CPU."""
    has = registry.capability(device)
    return has is None or has >= FIRST_WITH_FP8


def eight_bit(
    w: FourBit, dtype: torch.dtype, rotate: bool, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored [N, K'], scale [N, 1] float32) of a 4-bit weight, in 8 bits.

    dtype: float8_e4m3fn, or int8, rounded from the exact values, after a rotation where `rotate`.
    K' is K padded to a multiple of 16; columns from K on are 0. backend: of what is called.
    """
    if dtype != torch.int8:
        return decode_fp4_e4m3(w.packed, w.scale, w.tensor_scale, w.shape, w.group, backend)
    exact = decode_fp4(w.packed, w.scale, w.shape, w.group, torch.bfloat16, backend)
    # A rotation goes over whole blocks: without it padding does no harm.
    stored, scale = quantize_rows(exact, torch.int8, rotate, backend)
    return stored, scale if w.tensor_scale is None else scale * w.tensor_scale


def rotation_of(w_shape: tuple[int, int]) -> int:
    """Return over how many columns INT8 is rotated for a weight [N, K]; 0 where K does not fit."""
    return ROTATION if w_shape[1] % ROTATION == 0 else 0
