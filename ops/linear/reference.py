"""Dequantize the weight, multiply in the dtype of the input: right on every device, never fast."""

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ..registry import Backend, Needs, register

SCHEMES = frozenset(
    {
        "fp8_tensor",
        "fp8_row",
        "int8_row",
        "int8_row_convrot",
        "mxfp8",
        "mxfp4",
        "nvfp4",
        "convrot_w4a4",
        "asym_w4a8_int8",
    }
)


def run(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x · dequantize(W)ᵀ + bias; x [M, K], weight [N, K], bias [N] or None."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight.dequantize().to(x.dtype), bias)


register(Backend("linear", "reference", 100, Needs(SCHEMES), run))
