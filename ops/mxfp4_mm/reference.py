"""`mxfp4_mm` in plain torch, on any device: sums in float64."""

import torch
import torch.nn.functional as F

from .. import block_scales
from ..decode_fp4 import MXFP4_GROUP, decode_fp4
from ..registry import Backend, Needs, register
from . import OP, SCHEME


def quantize(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed [M, columns / 2] uint8, scale [M, columns / 32] uint8) of x [M, K] in MXFP4.

    columns: a multiple of 32, K or more; those from K on are 0. The even column is the high nibble,
    scales are not swizzled.
    """
    packed, scale = block_scales.mxfp4(F.pad(x.float(), (0, columns - x.shape[1])))
    return packed, scale.view(torch.uint8)


def run(x, packed, scale, bias, n) -> torch.Tensor:
    """Return the product as `mxfp4_mm` describes it."""
    k, columns = x.shape[1], 2 * packed.shape[1]
    stored, of_x = quantize(x, columns)
    factor = block_scales.e8m0_to_float(of_x).repeat_interleave(MXFP4_GROUP, dim=1)
    value = block_scales.unpack_e2m1(stored) * factor
    weight = decode_fp4(packed, scale, (n, k), MXFP4_GROUP, torch.float32, "reference")
    out = value.double() @ weight.double().t()
    if bias is not None:
        out += bias.double()
    return out.to(x.dtype)


register(Backend(OP, "reference", 100, Needs(frozenset({SCHEME})), run))
