"""W4A8: the 4-bit weight re-expressed in 8 bits, multiplied by activations of 8 bits.

E4M3 where the GPU multiplies FP8, with a scale per channel that leaves most codes exact; rotated
INT8 elsewhere, and for an activation that comes so. Where tokens are so few that to decode the
weight costs more than to multiply it, its activation is interleaved, and it is decoded while it is
multiplied.
"""

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ..fp4_scaled_mm import fp4_scaled_mm
from ..launch import TRITON_MIN
from ..quantize_rows.triton import K_MAX
from ..registry import BY_NAME, Backend, Needs, register
from ..scaled_mm import scaled_mm
from .activation import QuantizedActivation, quantize_activation
from .four_bit import GROUPS, W4A8_FP8, W4A8_INT8, eight_bit, four_bit


def run_quantized(
    x: QuantizedActivation,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    backend: str = "triton",
) -> torch.Tensor:
    """Return x · Wᵀ + bias, [M, N]. backend: of everything that is called for columns in order.

    The weight in 8 bits is scratch: allocated here and let go of here, so that all layers and all
    models use the same memory in turn, and CUDA graphs see nothing but ordinary memory.
    """
    w = four_bit(weight)
    if x.kind.interleaved:
        packed = (w.packed, w.scale, w.tensor_scale, w.shape, w.group)
        return fp4_scaled_mm(x.stored, x.scale, *packed, bias, out_dtype=x.dtype)
    a = x.stored
    stored, scale = eight_bit(w, x.kind.dtype, x.kind.rotation > 0, backend)
    if stored.shape[1] > a.shape[1]:
        missing = stored.shape[1] - a.shape[1]
        a = F.pad(a.view(torch.uint8), (0, missing)).view(a.dtype)
    return scaled_mm(a, stored, x.scale, scale, bias, out_dtype=x.dtype, backend=backend)


def run(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, backend="triton"):
    """Return x · Wᵀ + bias for floats [M, K]. backend: of everything that is called."""
    return run_quantized(quantize_activation(x, weight, backend=backend), weight, bias, backend)


def _register(name: str, rank: int, least: tuple[int, int], measured) -> None:
    needs = Needs(
        frozenset(GROUPS),
        devices=frozenset({"cuda"}),
        capability=least,
        measured=measured,
        k_max=K_MAX,
        package="triton.tools.tensor_descriptor",
        package_min=TRITON_MIN,
    )
    register(Backend("linear", name, rank, needs, run, run_quantized, quantizes=True))


_register("w4a8", 12, (8, 0), ((9, 0), (10, 0)))
# FP8 is what `w4a8` takes where it can; INT8 errs less, and is slower on Hopper.
_register(W4A8_FP8, 14, (8, 9), BY_NAME)
_register(W4A8_INT8, 15, (8, 0), BY_NAME)
