"""W4A8: the 4-bit weight re-expressed in 8 bits, multiplied by activations of 8 bits.

E4M3 where the GPU multiplies FP8, with a scale per channel that leaves most codes exact; rotated
INT8 elsewhere, and for an activation that comes so.
"""

import functools

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from .. import scratch
from ..launch import TRITON_MIN
from ..quantize_rows.triton import K_MAX
from ..registry import Backend, Needs, register
from ..scaled_mm import scaled_mm
from .activation import QuantizedActivation, quantize_activation
from .four_bit import GROUPS, FourBit, eight_bit, four_bit

# Tokens, and elements of a weight, with which the next layer's weight is decoded while this one
# multiplies: so it was 0 to 1.4% faster on an H200. With fewer it was up to 14% slower.
AHEAD_ROWS = range(16384, 1 << 62)
AHEAD_ELEMENTS = 1 << 24


def run_quantized(
    x: QuantizedActivation,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    backend: str = "triton",
) -> torch.Tensor:
    """Return x · Wᵀ + bias, [M, N]. backend: of everything that is called."""
    w, a = four_bit(weight), x.stored
    sources = (w.packed, w.scale, w.tensor_scale)
    form = (w.shape, w.group, x.kind.dtype, x.kind.rotation > 0, backend)
    look = None
    # In this order, so that a compiled graph does not depend on the number of tokens.
    if scratch.can_look_ahead(a.device) and _is_worth_it(a.shape[0], w.shape):
        look = scratch.ahead(a.device)
        stored, scale = look.take(sources, form, functools.partial(_prepare, form))
        look.begin()
    else:
        stored, scale = _prepare(form, *sources)
    if stored.shape[1] > a.shape[1]:
        missing = stored.shape[1] - a.shape[1]
        a = F.pad(a.view(torch.uint8), (0, missing)).view(a.dtype)
    out = scaled_mm(a, stored, x.scale, scale, bias, out_dtype=x.dtype, backend=backend)
    if look is not None:
        # Behind the product: what comes before it in time slows it down.
        look.go_on()
    return out


def _is_worth_it(rows: int, shape: tuple[int, int]) -> bool:
    return rows in AHEAD_ROWS and shape[0] * shape[1] >= AHEAD_ELEMENTS


def _prepare(form, packed, scale, tensor_scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight in 8 bits; form holds no tensor, for it outlives the call."""
    shape, group, dtype, rotate, backend = form
    return eight_bit(FourBit(packed, scale, tensor_scale, shape, group), dtype, rotate, backend)


def run(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, backend="triton"):
    """Return x · Wᵀ + bias for floats [M, K]. backend: of everything that is called."""
    return run_quantized(quantize_activation(x, weight, backend=backend), weight, bias, backend)


needs = Needs(
    frozenset(GROUPS),
    devices=frozenset({"cuda"}),
    capability=(8, 0),
    measured=((9, 0), (10, 0)),
    k_max=K_MAX,
    package="triton.tools.tensor_descriptor",
    package_min=TRITON_MIN,
)
register(Backend("linear", "w4a8", 12, needs, run, run_quantized, quantizes=True))
