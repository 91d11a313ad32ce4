"""The Triton backend of `quantize_rows`: how its kernel is launched."""

import functools

import torch

from ..launch import ALIGNMENT, TRITON_MIN, alignment
from ..registry import Backend, Needs, capability, register
from ..replay import empty, launch, replayed
from . import LIMITS, NOTHING, OP, ROTATION, SUFFIXES
from .prologue import Prologue, rows_of

# Powers of two that a row is cut into at most.
PIECES = 4
# Columns of the kernel's widest row: the registers of 4 warps hold it.
K_MAX = 16384
HOPPER = 9
# (rotated, with a prologue) -> (K at most, warps of a program): as few as keep a row in registers
# where threads exchange values, more where they do not. Measured on an H200.
HOPPER_WARPS = {
    (False, False): ((4096, 2), (K_MAX, 4)),
    (False, True): ((4096, 2), (K_MAX, 4)),
    (True, False): ((6144, 1), (14336, 2), (K_MAX, 4)),
    (True, True): ((6144, 1), (13824, 2), (K_MAX, 4)),
}
# Compiled and tested, not measured: other compilers' code takes more registers.
WARPS = {
    (rotated, prepared): ((6144, 2), (K_MAX, 4 if not rotated else 8))
    for rotated in (False, True)
    for prepared in (False, True)
}


@functools.cache
def cover(k: int) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Return (starts, groups, exact): powers of two of 256-column groups that cover k columns.

    exact: they end where the row ends.
    """
    left = -(-k // ROTATION)
    groups: list[int] = []
    while left > 0:
        size = 1 << (left.bit_length() - 1)
        if len(groups) == PIECES - 1 and left > size:
            size *= 2
        groups.append(size)
        left -= size
    starts = tuple(sum(groups[:i]) for i in range(len(groups)))
    return starts, tuple(groups), sum(groups) * ROTATION == k


def warps_of(capability: tuple[int, int] | None, k: int, rotated: bool, prepared: bool) -> int:
    """Return the warps of a program for rows of k columns, with a prologue or not."""
    hopper = capability is not None and capability[0] == HOPPER
    rows = (HOPPER_WARPS if hopper else WARPS)[rotated, prepared]
    return next(warps for k_max, warps in rows if k <= k_max)


def run(
    x: torch.Tensor,
    dtype: torch.dtype,
    rotated: bool,
    prologue: Prologue = NOTHING,
    input_scale: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored, scale) as `quantize_rows` describes them."""
    if x.stride(1) != 1:
        x = x.contiguous()
    p = prologue
    steps = (p.norm, p.eps, p.weight, p.bias, p.scale, p.shift, p.activation)
    return _run(x, dtype, rotated, input_scale, interleaved, *steps)


@replayed
def _run(x, dtype, rotated, input_scale, interleaved, *steps) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `run` does, for rows that are K-contiguous; steps: the fields of a prologue."""
    from .kernel import quantize_rows_kernel

    p = Prologue(*steps)
    m, k = x.shape
    stored = empty((m, k), dtype, x.device)
    row_scale = input_scale
    if input_scale is None:
        row_scale = empty((m, 1), torch.float32, x.device)
    tensors = (input_scale, p.weight, p.bias, p.scale, p.shift)
    rows = (rows_of(p.scale, m), rows_of(p.shift, m))
    sizes = (k, x.stride(0), rows[0][0], rows[1][0], rows[0][1], rows[1][1])
    constants = (
        *(LIMITS[dtype], *cover(k), rotated),
        *(p != NOTHING, p.norm or "", p.activation == "gelu_tanh", interleaved),
    )
    arguments = (x, stored, row_scale, *tensors, *sizes, p.eps, *constants)
    types = tuple(None if t is None else t.dtype for t in tensors)
    divisible = tuple((size % ALIGNMENT == 0, size == 1) for size in sizes)
    key = (x.dtype, dtype, alignment(x, *tensors), types, divisible, k, constants)
    warps = warps_of(capability(x.device), k, rotated, p != NOTHING)
    # A product and a sum rounded as one would round to other codes than the reference's.
    options = {"num_warps": warps, "enable_fp_fusion": False}
    launch(quantize_rows_kernel, m, arguments, options, key, x.device)
    return stored, row_scale


def _register(kind: str, capability: tuple[int, int]) -> None:
    needs = Needs(
        frozenset(f"{kind}{suffix}" for suffix in SUFFIXES),
        devices=frozenset({"cuda"}),
        capability=capability,
        k_max=K_MAX,
        package="triton",
        package_min=TRITON_MIN,
    )
    register(Backend(OP, "triton", 10, needs, run))


_register("int8", (8, 0))
# Triton has no FP8 types below.
_register("fp8", (8, 9))
