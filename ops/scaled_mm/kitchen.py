"""comfy-kitchen's products: `mm_int8`, and `scaled_mm_v2` for FP8 with one scale per tensor.

Both give the sums; torch's operations do the rest, or `scaled_mm_v2` where it can.
"""

import torch
from comfy_kitchen import mm_int8
from comfy_kitchen.scaled_mm_v2 import scaled_mm_v2

from ..current_gpu import on_gpu_of
from ..registry import Backend, Needs, register
from . import OP
from .reference import finished, scaled, with_low_rank
from .self_test import self_test
from .torch import CUDA, FP8_MULTIPLE, aligned, can_fuse


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
    with on_gpu_of(a):
        total = mm_int8(aligned(a), aligned(b).t())
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
    """Return the product of FP8 operands, one scale each, as `scaled_mm` describes it."""
    rest = (bias, activation, gate, residual, out_dtype)
    a, b = aligned(a), aligned(b)
    if low_rank is None and can_fuse("tensor", *rest):
        bias = None if bias is None else aligned(bias)
        with on_gpu_of(a):
            return scaled_mm_v2(a, b.t(), scale_a, scale_b, bias, out_dtype)
    one = scale_a.new_ones(())
    with on_gpu_of(a):
        total = scaled_mm_v2(a, b.t(), one, one, None, torch.float32)
    value = scaled(total, scale_a, scale_b, None, None)
    return finished(with_low_rank(value, low_rank), *rest)


def _register(what: str, run, schemes: tuple[str, ...], least: tuple[int, int], **needs) -> None:
    operands, scales = schemes[0].split("_")
    test = self_test(what, run, operands, scales)
    needs = Needs(frozenset(schemes), CUDA, capability=least, self_test=test, **needs)
    register(Backend(OP, "kitchen", 20, needs, run))


_register("comfy_kitchen.mm_int8", run_int8, ("int8_row", "int8_tensor"), (7, 5))
_register("comfy_kitchen.scaled_mm_v2", run_fp8, ("fp8_tensor",), (8, 9), n_multiple=FP8_MULTIPLE)
