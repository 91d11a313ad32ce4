"""Activations to 8 bits, one scale per token: the left operand of `scaled_mm`."""

import torch

from .. import registry
from ..custom_op import custom_op
from .order import BLOCK, interleave, restore
from .prologue import Prologue

OP = "quantize_rows"
# Columns that the rotation mixes: comfy-kitchen's regular Hadamard matrix of this width.
ROTATION = 256
INPUTS = (torch.bfloat16, torch.float16, torch.float32)
# Largest magnitude stored: symmetric for INT8, so -128 is not used.
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
NOTHING = Prologue()
# Of the schemes under which backends register, after "int8" and "fp8".
SUFFIXES = ("", "_rotated", "_bare", "_interleaved")

__all__ = ["Prologue", "interleave", "quantize_rows", "restore"]


def quantize_rows(
    x: torch.Tensor,
    dtype: torch.dtype,
    rotate: bool = False,
    backend: str = "auto",
    *,
    prologue: Prologue = NOTHING,
    input_scale: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored [M, K] of `dtype`, scale [M, 1] float32): x ≈ stored · scale, row by row.

    x: [M, K] bf16, fp16 or fp32, any strides, never written to. dtype: int8 or float8_e4m3fn.
    rotate: each 256 columns are multiplied by the Hadamard matrix before rounding; K % 256 = 0.
    prologue: what is done to each token before: norm, modulation, activation.
    input_scale: a static scale, one float32 element, FP8 only; it is then the scale returned, and
    larger values are cut off at ±448. interleaved: columns are stored in the order of `interleave`,
    FP8 without rotation only; K % 128 = 0.
    The arithmetic is float32: scale = largest magnitude / limit, at least the smallest normal
    float32; stored = x · (1 / scale), rounded to nearest even. A row with NaN or Inf has a scale
    that is NaN or Inf, and stored values without meaning (with a static scale, stored values that
    are NaN); a row of zeros gives zeros.
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
    if prologue is not NOTHING:
        prologue.check(*x.shape, x.device)
    if input_scale is not None:
        _check_input_scale(input_scale, dtype, x.device)
    if interleaved and (dtype == torch.int8 or rotate or x.shape[1] % BLOCK):
        raise ValueError(
            f"quantize_rows: interleaved columns are for FP8 without rotation, K a multiple of "
            f"{BLOCK}; got {dtype}, K={x.shape[1]}"
        )
    p = prologue
    steps = (p.norm or "", float(p.eps), p.weight, p.bias, p.scale, p.shift, p.activation or "")
    stored, scale = _OP(x, dtype, rotate, backend, input_scale, *steps, interleaved)
    return stored, scale if input_scale is None else input_scale.reshape(1, 1)


def _check_input_scale(scale: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(
            f"quantize_rows: input_scale is {scale.dtype} {list(scale.shape)}; one float32 element "
            "is wanted"
        )
    if scale.device != device:
        raise ValueError(f"quantize_rows: input_scale is on {scale.device}, x on {device}")
    if dtype == torch.int8:
        # An integer cannot say that a value was NaN; a scale of the row's own can.
        raise ValueError("quantize_rows: a static input_scale is for FP8; INT8 takes the row's own")


def scheme(dtype: torch.dtype, rotate: bool, bare: bool = False, interleaved: bool = False) -> str:
    """Return the name under which backends register what they can do.

    bare: nothing but the rounding is done, neither a rotation nor steps of a prologue.
    """
    suffix = "_rotated" if rotate else "_interleaved" if interleaved else "_bare" if bare else ""
    return ("int8" if dtype == torch.int8 else "fp8") + suffix


def _run(x, dtype, rotate, backend, input_scale, *steps):
    norm, eps, weight, bias, scale, shift, activation, interleaved = steps
    bare = not (norm or activation) and weight is bias is scale is shift is None
    name = scheme(dtype, rotate, bare, interleaved)
    call = registry.Call(name, x.device, 0, x.shape[1])
    run = registry.select(OP, call, backend).run
    if x.numel() == 0:
        return _empty(x, dtype, rotate, backend, input_scale)
    prologue = NOTHING
    if not bare:
        prologue = Prologue(norm or None, eps, weight, bias, scale, shift, activation or None)
    stored, scale = run(x, dtype, rotate, prologue, input_scale, interleaved)
    # A result of an operation is no alias of its arguments.
    return stored, scale if input_scale is None else x.new_empty(0, 1, dtype=torch.float32)


def _empty(x, dtype, rotate, backend, input_scale, *steps) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[0] if input_scale is None else 0
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device), scale


_OP = custom_op(
    "quantize_rows(Tensor x, ScalarType dtype, bool rotate, str backend, Tensor? input_scale, "
    "str norm, float eps, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "str activation, bool interleaved) -> (Tensor, Tensor)",
    _run,
    _empty,
)
registry.discover(__name__)
