"""`fp4_mm` in plain torch, on any device: sums in float64."""

import torch

from ..decode_fp4 import decode_fp4
from ..registry import Backend, Needs, register
from . import OP, SCHEMES


def run(x, packed, scale, tensor_scale, bias, n, group) -> torch.Tensor:
    """Return the product as `fp4_mm` describes it."""
    k = x.shape[1]
    weight = decode_fp4(packed, scale, (n, k), group, torch.float32, "reference")
    value = x.double() @ weight[:, :k].double().t()
    if tensor_scale is not None:
        value *= tensor_scale.double()
    if bias is not None:
        value += bias.double()
    return value.to(x.dtype)


register(Backend(OP, "reference", 100, Needs(frozenset(SCHEMES)), run))
