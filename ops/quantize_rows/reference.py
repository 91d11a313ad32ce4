"""`quantize_rows` in plain torch, on any device."""

import torch
from comfy_kitchen.tensor.int8_utils import _build_hadamard

from ..registry import Backend, Needs, register
from ..rounding import SMALLEST_SCALE
from . import LIMITS, OP, ROTATION


def rotate(x: torch.Tensor, width: int = ROTATION) -> torch.Tensor:
    """Return x [M, K] with every `width` columns multiplied by the Hadamard matrix, in float32."""
    matrix = _build_hadamard(width, x.device)
    return (x.float().reshape(-1, width) @ matrix).reshape(x.shape)


def run(x: torch.Tensor, dtype: torch.dtype, rotated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored, scale) as `quantize_rows` describes them."""
    x = rotate(x) if rotated else x.float()
    limit = LIMITS[dtype]
    scale = (x.abs().amax(dim=1, keepdim=True) / limit).clamp_min(SMALLEST_SCALE)
    value = x * (1 / scale)
    if dtype == torch.int8:
        # What a NaN becomes as an integer is undefined.
        value = value.nan_to_num(0).round()
    return value.clamp(-limit, limit).to(dtype), scale


SCHEMES = frozenset({"int8", "int8_rotated", "fp8", "fp8_rotated"})
register(Backend(OP, "reference", 100, Needs(SCHEMES), run))
