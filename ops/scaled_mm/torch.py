"""torch's own products: `_int_mm` for INT8, `_scaled_mm` for FP8.

Where `_scaled_mm` can do all that is asked, it does. Else it gives the sums in FP32, and torch's
operations do the rest, each of which reads and writes the result once: so there is one rounding,
as everywhere.
"""

import torch
import torch.nn.functional as F

from ..launch import ALIGNMENT
from ..registry import Backend, Needs, register
from . import OP
from .check import BLOCK, granularity
from .reference import finished, scaled, with_low_rank
from .self_test import self_test

CUDA = frozenset({"cuda"})
# `_int_mm` wants more rows than 16.
INT8_ROWS = 17
INT8_MULTIPLE, FP8_MULTIPLE = 8, 16
# Scales of blocks in 16 bytes, cuBLASLt's step over them: along the rows of a, which are padded
# here, and along K for b, where torch itself would have to.
SCALES = 4


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x where cuBLASLt can read it: a weight that is mapped from a file starts anywhere."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return x [M, K] of 8 bits with zeros below it, up to so many rows."""
    if x.shape[0] >= rows:
        return x
    return F.pad(x.view(torch.uint8), (0, 0, 0, rows - x.shape[0])).view(x.dtype)


def run_int8(
    a,
    b,
    scale_a,
    scale_b,
    bias,
    zero_point,
    column_sum,
    activation,
    gate,
    residual,
    out_dtype,
    low_rank=None,
) -> torch.Tensor:
    """Return the product of INT8 operands as `scaled_mm` describes it."""
    total = torch._int_mm(aligned(_padded(a, INT8_ROWS)), aligned(b).t())[: a.shape[0]]
    value = scaled(total, scale_a, scale_b, zero_point, column_sum)
    rest = (bias, activation, gate, residual, out_dtype)
    return finished(with_low_rank(value, low_rank), *rest)


def run_fp8(
    a,
    b,
    scale_a,
    scale_b,
    bias,
    zero_point,
    column_sum,
    activation,
    gate,
    residual,
    out_dtype,
    low_rank=None,
) -> torch.Tensor:
    """Return the product of FP8 operands as `scaled_mm` describes it."""
    rest = (bias, activation, gate, residual, out_dtype)
    scales = granularity(a, b, scale_a, scale_b)
    if scales == "block":
        return _run_blocks(a, b, scale_a, scale_b, rest, low_rank)
    if scales == "row":
        scale_a = scale_a.reshape(-1, 1).expand(a.shape[0], 1).contiguous()
        scale_b = scale_b.reshape(1, -1).expand(1, b.shape[0]).contiguous()
    if low_rank is None and can_fuse(scales, *rest):
        return _product(a, b, scale_a, scale_b, bias, out_dtype)
    one = scale_a.new_ones(())
    value = scaled(_product(a, b, one, one, None, torch.float32), scale_a, scale_b, None, None)
    return finished(with_low_rank(value, low_rank), *rest)


def can_fuse(scales: str, bias, activation, gate, residual, out_dtype) -> bool:
    """Return whether `_scaled_mm` does all of this: on every GPU that it knows, since torch 2.9.

    A bias is added in the dtype of the result, which with scales per row is bfloat16.
    """
    outputs = (torch.bfloat16, torch.float16) if scales == "tensor" else (torch.bfloat16,)
    plain = activation is None and gate is None and residual is None
    return plain and out_dtype in outputs and (bias is None or bias.dtype == out_dtype)


def _run_blocks(a, b, scale_a, scale_b, rest, low_rank):
    m = a.shape[0]
    rows = -(-m // SCALES) * SCALES
    scale_a = F.pad(scale_a, (0, 0, 0, rows - m))
    # In memory, the scales of a column of blocks stand side by side.
    scale_a = scale_a.t().contiguous().t()
    value = _product(_padded(a, rows), b, scale_a, scale_b.t(), None, torch.float32)[:m]
    return finished(with_low_rank(value, low_rank), *rest)


def _product(a, b, scale_a, scale_b, bias, out_dtype) -> torch.Tensor:
    return torch._scaled_mm(
        aligned(a),
        aligned(b).t(),
        scale_a=scale_a,
        scale_b=scale_b,
        bias=None if bias is None else aligned(bias),
        out_dtype=out_dtype,
    )


def _register(what: str, run, schemes: tuple[str, ...], least: tuple[int, int], **needs) -> None:
    operands, scales = schemes[0].split("_")
    test = self_test(what, run, operands, scales)
    needs = Needs(frozenset(schemes), CUDA, capability=least, self_test=test, **needs)
    register(Backend(OP, "torch", 30, needs, run))


_register("torch._int_mm", run_int8, ("int8_row", "int8_tensor"), (7, 5), n_multiple=INT8_MULTIPLE)
for _scheme in ("fp8_tensor", "fp8_row"):
    _register("torch._scaled_mm", run_fp8, (_scheme,), (8, 9), n_multiple=FP8_MULTIPLE)
_register(
    "torch._scaled_mm",
    run_fp8,
    ("fp8_block",),
    (9, 0),
    n_multiple=FP8_MULTIPLE,
    k_multiple=SCALES * BLOCK,
)
