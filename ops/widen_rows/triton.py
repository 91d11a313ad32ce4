"""The Triton backend of `widen_rows`: how its kernel is launched."""

import torch

from ..launch import ALIGNMENT, TRITON_MIN, alignment, launch
from ..registry import Backend, Needs, register
from . import E4M3, OP

# Elements of h in a program, few, as one that changes rows of x takes long; columns of x that it
# changes at a time; its warps.
ELEMENTS, COLUMNS, WARPS = 1024, 512, 4


def run(h, stored, scale, scale_up, scale_weight) -> torch.Tensor:
    """Return w as `widen_rows` describes it."""
    from .kernel import widen_rows_kernel

    (m, rank), k = h.shape, stored.shape[1]
    out = torch.empty(m, rank, dtype=E4M3, device=h.device)
    width = 1 << (rank - 1).bit_length()
    rows = max(ELEMENTS // width, 1)
    tensors = (h, stored, scale, scale_up, scale_weight, out)
    sizes, constants = (k, rank, h.stride(0)), (rows, width, COLUMNS)
    divisible = tuple((size % ALIGNMENT == 0, size == 1) for size in sizes)
    key = (h.dtype, alignment(*tensors), divisible, constants)
    arguments = (*tensors, m, *sizes, *constants)
    launch(widen_rows_kernel, -(-m // rows), arguments, {"num_warps": WARPS}, key, h.device)
    return out


register(
    Backend(
        OP,
        "triton",
        10,
        Needs(
            frozenset({"fp8"}),
            devices=frozenset({"cuda"}),
            capability=(8, 9),
            package="triton",
            package_min=TRITON_MIN,
        ),
        run,
    )
)
