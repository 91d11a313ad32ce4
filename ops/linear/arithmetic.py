"""In which arithmetic a 4-bit weight is multiplied, where its owner wants to say so.

The wish is part of the weight's layout, a subclass under a name of its own: whatever moves, copies,
casts or quantizes the weight again (a LoRA that is merged, memory management) keeps the name of the
layout, and with it the wish. What is stored, and saved, is the same.
"""

import functools

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class, register_layout_class
from torch import nn

from .eight_bits import least_error
from .four_bit import GROUPS, W4A8_FP8, W4A8_INT8

AUTO, W4A8, NATIVE, EXACT = "auto", "w4a8", "native", "w4a8_exact"
# What may be wished for: weights of 4 bits with activations of 16, of 8, or of 4 on tensor cores
# that have them. EXACT is a question, which is answered when it is asked: W4A8 in FP8 or INT8,
# whichever errs less for the weight.
ARITHMETICS = (AUTO, "w4a16", W4A8, NATIVE, EXACT, W4A8_FP8, W4A8_INT8)
# By the weight's scheme, the backend of `linear` that multiplies 4 bits as they are.
NATIVE_BACKENDS = {"nvfp4": "kitchen", "mxfp4": "w4a4"}


def with_arithmetic(
    weight: QuantizedTensor, arithmetic: str, device: torch.device | None = None
) -> QuantizedTensor:
    """Return `weight`, of its class and on its memory, to be multiplied in `arithmetic`.

    arithmetic: one of ARITHMETICS. Where that cannot run, `linear` raises NoBackendError with the
    reason. "auto" takes a wish back. "w4a8_exact" becomes "w4a8_fp8" or "w4a8_int8" here, once:
    `least_error` says which. device: where the layer will run, for that; None: where the weight is.
    Raises ValueError for other names, and for a weight that has not 4 bits; TypeError for one that
    is not quantized.
    """
    check_name(arithmetic)
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(f"the weight is not quantized: a {type(weight).__name__} of {weight.dtype}")
    layout = weight.layout_cls
    if layout.scheme not in GROUPS:
        raise ValueError(f"arithmetic is for {', '.join(GROUPS)} weights, not {layout.scheme}")
    if arithmetic == EXACT:
        arithmetic = least_error(weight, device)
    plain = getattr(layout, "plain_layout", weight._layout_cls)
    name = plain if arithmetic == AUTO else _layout(plain, arithmetic)
    made = type(weight)(weight._qdata, name, weight._params)
    is_parameter = isinstance(weight, nn.Parameter)
    return nn.Parameter(made, requires_grad=False) if is_parameter else made


def arithmetic_of(weight: QuantizedTensor) -> str:
    """Return the arithmetic that was wished for a weight, "auto" where none was."""
    return getattr(weight.layout_cls, "arithmetic", AUTO)


def backend_of(weight: QuantizedTensor) -> str:
    """Return the backend of `linear` that a weight asks for."""
    return backend_named(arithmetic_of(weight), weight.layout_cls.scheme)


def backend_named(arithmetic: str, scheme: str) -> str:
    """Return the backend of `linear` that does one of ARITHMETICS for weights of a scheme.

    Of EXACT, whose answer depends on the weight, the one that needs what every answer needs.
    """
    if arithmetic == NATIVE:
        return NATIVE_BACKENDS[scheme]
    return W4A8 if arithmetic == EXACT else arithmetic


def check_name(arithmetic: str) -> None:
    """Raise ValueError for what is none of ARITHMETICS."""
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}; {', '.join(ARITHMETICS)} are known")


@functools.cache
def _layout(plain: str, arithmetic: str) -> str:
    """Return the name of the layout `plain` with a wish, which is registered."""
    base = get_layout_class(plain)
    name = f"{plain}_{arithmetic}"
    wish = {"arithmetic": arithmetic, "plain_layout": plain, "__doc__": base.__doc__}
    register_layout_class(name, type(name, (base,), wish))
    return name
