"""`scaled_mm` in plain torch, on any device: exact sums, then the epilogue in float32."""

import torch

from ..registry import Backend, Needs, register
from . import OP


def run(a, b, scale_a, scale_b, bias, zero_point, column_sum, out_dtype) -> torch.Tensor:
    """Return the product as `scaled_mm` describes it.

    Sums of INT8 products are exact in float64, which holds integers to 2^53.
    """
    total = a.double() @ b.double().t()
    if zero_point is not None:
        total -= zero_point.double()[:, None] * column_sum.double()[None, :]
    value = total.float() * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)
    if bias is not None:
        value = value + bias.float()
    return value.to(out_dtype)


register(Backend(OP, "reference", 100, Needs(frozenset({"int8", "fp8"})), run))
