"""`fp4_scaled_mm` in plain torch, on any device: sums in float64."""

import torch

from ..decode_fp4 import decode_fp4_e4m3
from ..quantize_rows.order import restore
from ..registry import Backend, Needs, register
from . import OP, SCHEMES


def run(x, x_scale, packed, scale, tensor_scale, bias, n, group, out_dtype) -> torch.Tensor:
    """Return the product as `fp4_scaled_mm` describes it."""
    shape = (n, x.shape[1])
    stored, rows = decode_fp4_e4m3(packed, scale, tensor_scale, shape, group, "reference")
    value = restore(x).double() @ stored.double().t()
    value = value * x_scale.reshape(-1, 1).double() * rows.double().t()
    if bias is not None:
        value = value + bias.double()
    return value.to(out_dtype)


register(Backend(OP, "reference", 100, Needs(frozenset(SCHEMES)), run))
