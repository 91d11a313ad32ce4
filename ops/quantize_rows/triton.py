"""The Triton backend of `quantize_rows`: how its kernel is launched."""

import functools

import torch

from ..launch import ALIGNMENT, alignment, launch
from ..registry import Backend, Needs, register
from . import LIMITS, OP, ROTATION

PIECES = 3
# Columns of the kernel's widest row: the registers of 4 warps hold it.
K_MAX = 16384
# (K at most, warps of a program): as few as keep a row in registers. Measured on an H200.
WARPS = ((2048, 1), (14336, 2), (K_MAX, 4))


@functools.cache
def pieces(k: int) -> tuple[int, ...]:
    """Return three numbers of 256-column groups, powers of two or zero, that cover k columns."""
    left = -(-k // ROTATION)
    sizes = []
    for index in range(PIECES):
        size = 1 << (left.bit_length() - 1) if left else 0
        if index == PIECES - 1 and left > size:
            size *= 2
        sizes.append(size)
        left -= min(size, left)
    return tuple(sizes)


def run(x: torch.Tensor, dtype: torch.dtype, rotated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored, scale) as `quantize_rows` describes them."""
    from .kernel import quantize_rows_kernel

    if x.stride(1) != 1:
        x = x.contiguous()
    m, k = x.shape
    stored = torch.empty(m, k, dtype=dtype, device=x.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    stride = x.stride(0)
    constants = (LIMITS[dtype], *pieces(k), rotated, dtype == torch.int8)
    arguments = (x, stored, scale, k, stride, *constants)
    key = (x.dtype, alignment(x), k, stride % ALIGNMENT, stride == 1, constants)
    warps = next(warps for k_max, warps in WARPS if k <= k_max)
    # A product and a sum rounded as one would round to other codes than the reference's.
    options = {"num_warps": warps, "enable_fp_fusion": False}
    launch(quantize_rows_kernel, m, arguments, options, key, x.device)
    return stored, scale


def _register(schemes: set[str], capability: tuple[int, int]) -> None:
    needs = Needs(
        frozenset(schemes),
        devices=frozenset({"cuda"}),
        capability=capability,
        k_max=K_MAX,
        package="triton",
    )
    register(Backend(OP, "triton", 10, needs, run))


_register({"int8", "int8_rotated"}, (8, 0))
# Triton has no FP8 types below.
_register({"fp8", "fp8_rotated"}, (8, 9))
