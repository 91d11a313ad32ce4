"""The product of two 8-bit matrices, scaled: the arithmetic behind 8-bit linear layers."""

import torch

from .. import registry
from ..custom_op import custom_op
from .check import check

OP = "scaled_mm"


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    zero_point: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """Return scale_a · scale_b · (a·bᵀ − zero_point · column_sum) + bias, [M, N].

    a: [M, K], b: [N, K], both INT8 (summed in INT32) or both FP8 (summed in FP32), K-contiguous,
    K % 16 = 0. scale_a: float32, one or [M, 1]; scale_b: float32, one or [N, 1]. bias: [N].
    zero_point: [M] int32, of a; column_sum: [N] int32, the sums of b along K. out_dtype: bfloat16,
    float16 or float32. The epilogue is float32, in the order of the formula.
    Raises TypeError or ValueError when arguments do not fit (`check.py`), NoBackendError when no
    backend can run them.
    """
    check(a, b, scale_a, scale_b, bias, zero_point, column_sum, out_dtype)
    return _OP(a, b, scale_a, scale_b, bias, zero_point, column_sum, out_dtype, backend)


def _run(a, b, scale_a, scale_b, bias, zero_point, column_sum, out_dtype, backend):
    scheme = "int8" if a.dtype == torch.int8 else "fp8"
    call = registry.Call(scheme, a.device, b.shape[0], b.shape[1])
    run = registry.select(OP, call, backend).run
    if a.shape[0] == 0 or b.shape[0] == 0:
        return _empty(a, b, *[None] * 5, out_dtype, backend)
    return run(a, b, scale_a, scale_b, bias, zero_point, column_sum, out_dtype)


def _empty(a, b, scale_a, scale_b, bias, zero_point, column_sum, out_dtype, backend):
    return torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)


_OP = custom_op(
    "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, "
    "Tensor? zero_point, Tensor? column_sum, ScalarType out_dtype, str backend) -> Tensor",
    _run,
    _empty,
)
registry.discover(__name__)
