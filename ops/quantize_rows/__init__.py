"""Activations to 8 bits, one scale per token: the left operand of `scaled_mm`."""

import torch

from .. import registry
from ..custom_op import custom_op

OP = "quantize_rows"
# Columns that the rotation mixes: comfy-kitchen's regular Hadamard matrix of this width.
ROTATION = 256
INPUTS = (torch.bfloat16, torch.float16, torch.float32)
# Largest magnitude stored: symmetric for INT8, so -128 is not used.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, rotate: bool = False, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored [M, K] of `dtype`, scale [M, 1] float32): x ≈ stored · scale, row by row.

    x: [M, K] bf16, fp16 or fp32, any strides, never written to. dtype: int8 or float8_e4m3fn.
    rotate: each 256 columns are multiplied by the Hadamard matrix before rounding; K % 256 = 0.
    The arithmetic is float32: scale = largest magnitude / limit, at least the smallest normal
    float32; stored = x · (1 / scale), rounded to nearest even. A row with NaN or Inf has a scale
    that is NaN or Inf, and stored values without meaning; a row of zeros gives zeros.
    Raises ValueError or TypeError on other inputs, NoBackendError when no backend can run them.
    """
    if dtype not in LIMITS:
        raise TypeError(f"quantize_rows: to {dtype}; torch.int8 and torch.float8_e4m3fn are known")
    if x.dtype not in INPUTS:
        raise TypeError(f"quantize_rows: x is {x.dtype}; cast it to bfloat16, float16 or float32")
    if x.dim() != 2:
        raise ValueError(f"quantize_rows: x is {list(x.shape)}; flatten it to [tokens, features]")
    if rotate and x.shape[1] % ROTATION:
        raise ValueError(
            f"quantize_rows: K={x.shape[1]} is not a multiple of {ROTATION}, which the rotation "
            "needs; choose a format without rotation for this layer"
        )
    return _OP(x, dtype, rotate, backend)


def scheme(dtype: torch.dtype, rotate: bool) -> str:
    """Return the name under which backends register what they can do."""
    return ("int8" if dtype == torch.int8 else "fp8") + ("_rotated" if rotate else "")


def _run(x: torch.Tensor, dtype: torch.dtype, rotate: bool, backend: str):
    call = registry.Call(scheme(dtype, rotate), x.device, 0, x.shape[1])
    run = registry.select(OP, call, backend).run
    return _empty(x, dtype) if x.numel() == 0 else run(x, dtype, rotate)


def _empty(x: torch.Tensor, dtype: torch.dtype, *_) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device), scale


_OP = custom_op(
    "quantize_rows(Tensor x, ScalarType dtype, bool rotate, str backend) -> (Tensor, Tensor)",
    _run,
    _empty,
)
registry.discover(__name__)
