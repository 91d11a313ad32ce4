"""Which arithmetic really runs for a format, in words: weights and activations by their bits.

"W4A8 on FP8 tensor cores": 4-bit weights, 8-bit activations, products on the FP8 units. What runs
is the registry's choice; the words for it are here, in two small tables.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import comfy_kitchen
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..ops import registry
from ..ops.linear import OP
from ..ops.linear.arithmetic import AUTO, EXACT, backend_named, backend_of, check_name
from ..ops.linear.four_bit import GROUPS, has_fp8
from . import formats

REFERENCE = "reference"
KITCHEN = "kitchen"
# A weight [SIDE, SIDE] fits every backend's multiples.
SIDE = 4096
EAGER = "eager"
FP8_CAPABILITY = (8, 9)
# Generations whose INT4 tensor cores comfy-kitchen uses; on later ones it unpacks INT4 to INT8.
INT4_SCHEME = "convrot_w4a4"
INT4_MAJORS = {7, 8}

# Backends that do the same whatever the scheme; {eight}: FP8 or INT8, as the GPU has it.
BY_BACKEND = {
    "w4a16": "W4A16 on bf16 tensor cores",
    "w4a8": "W4A8 on {eight} tensor cores",
    "w4a8_fp8": "W4A8 on FP8 tensor cores",
    "w4a8_int8": "W4A8 on INT8 tensor cores",
    "w4a4": "W4A4 on FP4 tensor cores",
}
BY_SCHEME = {
    "fp8_tensor": "W8A8 on FP8 tensor cores",
    "fp8_row": "W8A8 on FP8 tensor cores",
    "int8_row": "W8A8 on INT8 tensor cores",
    "int8_row_convrot": "W8A8 on INT8 tensor cores",
    "mxfp8": "W8A8 on MXFP8 tensor cores",
    "asym_w4a8_int8": "W4A8 on INT8 tensor cores",
    "convrot_w4a4": "W4A4 on INT4 tensor cores",
    "nvfp4": "W4A4 on FP4 tensor cores",
    "mxfp4": "W4A4 on FP4 tensor cores",
}
# Which `auto` takes beside W4A8.
FEW_TOKENS = ", few tokens W4A16"
# What the wish for the least error may give.
LEAST_ERROR = "W4A8 on FP8 or INT8 tensor cores, whichever errs less for the layer"
DEQUANTIZED = "dequantized, multiplied in the input's dtype"


class Arithmetic(NamedTuple):
    """What a backend does, in words, and whether that emulates what the format stands for."""

    words: str
    emulated: bool


def of(backend: str, call: registry.Call, wished: bool = False) -> Arithmetic:
    """Return how the backend of that name computes `call`; wished: not chosen by `auto`."""
    if backend == REFERENCE:
        return Arithmetic(f"emulated: {DEQUANTIZED}", True)
    if call.device.type == "cpu":
        return Arithmetic("emulated on the CPU: right, not fast", True)
    if backend == KITCHEN and not _kitchen_has_kernels():
        return Arithmetic("emulated: comfy-kitchen has no kernels here", True)
    capability = registry.capability(call.device) or (0, 0)
    if backend in BY_BACKEND:
        eight = "FP8" if capability >= FP8_CAPABILITY else "INT8"
        few = FEW_TOKENS if backend == "w4a8" and not wished else ""
        return Arithmetic(BY_BACKEND[backend].format(eight=eight) + few, False)
    if call.scheme == INT4_SCHEME and capability[0] not in INT4_MAJORS:
        return Arithmetic("W4A4 on INT8 tensor cores, in 4-bit numbers", False)
    return Arithmetic(BY_SCHEME[call.scheme], False)


def of_wish(wish: str, call: registry.Call) -> Arithmetic:
    """Return how `call`, of 4-bit weights, is computed in one of ARITHMETICS that can run."""
    if wish == EXACT and has_fp8(call.device):
        return Arithmetic(LEAST_ERROR, False)
    return of(backend_named(wish, call.scheme), call, True)


def check(format_name: str, wish: str, device: torch.device) -> None:
    """Raise when 4-bit weights of a format cannot be multiplied as is wished, on `device`.

    format_name: of `formats`; of other names nothing is known yet. wish: one of ARITHMETICS. Raises
    ValueError for unknown wishes and for formats that have no choice, NoBackendError with the
    reason where the wish cannot run.
    """
    check_name(wish)
    if wish == AUTO or format_name not in formats.names():
        return
    scheme = formats.get(format_name).layout.scheme
    if scheme not in GROUPS:
        raise ValueError(f"arithmetic {wish} is for {', '.join(GROUPS)}, not for {format_name}")
    registry.select(OP, registry.Call(scheme, device, SIDE, SIDE), backend_named(wish, scheme))


def _kitchen_has_kernels() -> bool:
    states = comfy_kitchen.list_backends().items()
    return any(s["available"] and not s["disabled"] for name, s in states if name != EAGER)


def summary(weights: Iterable[QuantizedTensor], device: torch.device) -> str:
    """Return one line: how many layers of each format run on `device`, by which arithmetic."""
    counts: Counter[str] = Counter()
    for weight in weights:
        fmt = formats.of(weight)
        # Of many tokens.
        call = registry.Call(fmt.layout.scheme, device, *weight.shape, few=False)
        wish = backend_of(weight)
        words = of(registry.select(OP, call, wish).name, call, wish != AUTO).words
        counts[f"{fmt.name} weights, {words}"] += 1
    return "; ".join(f"{n} of {text}" for text, n in counts.items()) or "no quantized layers"
