"""Whether a library's scaled product is right on a device: asked once, before it is used."""

from collections.abc import Callable

import torch

from . import reference
from .check import BLOCK, FP8

# Rows that no tile divides, and more than one block of columns both ways.
M, N, K = 19, BLOCK + 16, 4 * BLOCK
OUTPUTS = (torch.bfloat16, torch.float32)
# The sums are of the same 8-bit values: only the result's rounding is left, and Hopper's 14 bits.
MAX_ERROR = 2 * torch.finfo(torch.bfloat16).eps


def self_test(what: str, run: Callable, operands: str, scales: str) -> Callable:
    """Return a test of a backend's `run`, for `Needs.self_test`: a reason on a device, or None.

    what: the name of the library's product, for the reason. operands: int8 or fp8; scales: of
    `check.granularity`.
    """

    def test(device: torch.device) -> str | None:
        a, b, scale_a, scale_b = (x.to(device) for x in _example(operands, scales))
        for out_dtype in OUTPUTS:
            arguments = (a, b, scale_a, scale_b, *[None] * 6, out_dtype)
            try:
                got = run(*arguments)
            except (RuntimeError, ValueError) as error:
                return f"{what}, {scales} scales, fails here: {error}"
            want = reference.run(*arguments).double()
            error = ((got.double() - want).norm() / want.norm()).item()
            # Not `>`, which NaN would pass.
            if not error <= MAX_ERROR:
                return f"{what}, {scales} scales, errs by {error:.2f} here"
        return None

    return test


def _example(operands: str, scales: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tensor": ((1,), (1,)),
        "row": ((M, 1), (N, 1)),
        "block": ((M, K // BLOCK), (-(-N // BLOCK), K // BLOCK)),
    }
    dtype = torch.int8 if operands == "int8" else FP8[0]
    a, b = (torch.randn(rows, K, generator=generator) * 30 for rows in (M, N))
    scale_a, scale_b = (torch.rand(s, generator=generator) + 0.5 for s in shapes[scales])
    return a.to(dtype), b.to(dtype), scale_a, scale_b
