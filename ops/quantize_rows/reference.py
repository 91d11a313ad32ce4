"""`quantize_rows` in plain torch, on any device."""

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor.int8_utils import _build_hadamard

from ..custom_op import custom_op
from ..registry import Backend, Needs, register
from ..rounding import SMALLEST_SCALE
from . import LIMITS, NOTHING, OP, ROTATION, SUFFIXES
from .order import interleave
from .prologue import Prologue


def rotate(x: torch.Tensor, width: int = ROTATION) -> torch.Tensor:
    """Return x [M, K] with every `width` columns multiplied by the Hadamard matrix, in float32."""
    return _ROTATE(x, width)


def _rotate(x: torch.Tensor, width: int) -> torch.Tensor:
    matrix = _build_hadamard(width, x.device)
    return (x.float().reshape(-1, width) @ matrix).reshape(x.shape)


# comfy-kitchen keeps the matrix, which is none that a compiler's trace may compute with.
_ROTATE = custom_op(
    "rotate(Tensor x, int width) -> Tensor",
    _rotate,
    lambda x, width: x.new_empty(x.shape, dtype=torch.float32),
)


def prepare(x: torch.Tensor, prologue: Prologue) -> torch.Tensor:
    """Return x [M, K] after the steps of `prologue`, in float32."""
    m, k = x.shape
    x = x.float()
    if prologue.norm == "layer":
        x = F.layer_norm(x, (k,), eps=prologue.eps)
    elif prologue.norm == "rms":
        x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + prologue.eps)
    if prologue.weight is not None:
        x = x * prologue.weight.float()
    if prologue.bias is not None:
        x = x + prologue.bias.float()
    if prologue.scale is not None:
        x = x * (1 + _per_token(prologue.scale, m))
    if prologue.shift is not None:
        x = x + _per_token(prologue.shift, m)
    return F.gelu(x, approximate="tanh") if prologue.activation == "gelu_tanh" else x


def _per_token(value: torch.Tensor, m: int) -> torch.Tensor:
    value = value.float().reshape(-1, value.shape[-1])
    return value.repeat_interleave(m // value.shape[0], dim=0)


def run(
    x: torch.Tensor,
    dtype: torch.dtype,
    rotated: bool,
    prologue: Prologue = NOTHING,
    input_scale: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored, scale) as `quantize_rows` describes them."""
    if interleaved:
        stored, scale = run(x, dtype, rotated, prologue, input_scale)
        return interleave(stored), scale
    # Rows of the result lie one after the other, whatever those of x do.
    value = (x.float() if prologue == NOTHING else prepare(x, prologue)).contiguous()
    if rotated:
        value = rotate(value.to(x.dtype))
    limit = LIMITS[dtype]
    if input_scale is not None:
        value = value * (1 / input_scale)
        # Cut off at the limit, Inf would pass for a number.
        value = torch.where(value.isinf(), torch.nan, value)
        return value.clamp(-limit, limit).to(dtype), input_scale.reshape(1, 1)
    scale = (value.abs().amax(dim=1, keepdim=True) / limit).clamp_min(SMALLEST_SCALE)
    value = value * (1 / scale)
    if dtype == torch.int8:
        # What a NaN becomes as an integer is undefined.
        value = value.nan_to_num(0).round()
    return value.clamp(-limit, limit).to(dtype), scale


SCHEMES = frozenset(f"{kind}{suffix}" for kind in ("int8", "fp8") for suffix in SUFFIXES)
register(Backend(OP, "reference", 100, Needs(SCHEMES), run))
