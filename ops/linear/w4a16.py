"""W4A16: the 4-bit weight multiplied as it is, by 16-bit activations."""

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..fp4_mm import fp4_mm
from ..launch import TRITON_MIN
from ..registry import Backend, Needs, register
from .four_bit import GROUPS, four_bit


def run(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, backend="auto"):
    """Return x · Wᵀ + bias for floats [M, K]. backend: of `fp4_mm`."""
    w = four_bit(weight)
    return fp4_mm(x, w.packed, w.scale, w.tensor_scale, w.shape, w.group, bias, backend)


def _register(rank: int, few: bool | None) -> None:
    needs = Needs(
        frozenset(GROUPS),
        devices=frozenset({"cuda"}),
        capability=(8, 0),
        measured=((9, 0), (10, 0)),
        few=few,
        package="triton",
        package_min=TRITON_MIN,
    )
    register(Backend("linear", "w4a16", rank, needs, run))


# First for few tokens; behind W4A8 for many, where that cannot run.
_register(11, True)
_register(13, None)
