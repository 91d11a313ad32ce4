"""`scaled_mm` in plain torch, on any device: exact sums, then the epilogue in float32."""

import torch
import torch.nn.functional as F

from ..registry import Backend, Needs, register
from . import OP
from .check import BLOCK, granularity

SCHEMES = frozenset(
    f"{operands}_{scales}"
    for operands in ("int8", "fp8", "fp8_mixed", "fp8_e5m2")
    for scales in ("tensor", "row", "block")
)


def run(
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
    """Return the product as `scaled_mm` describes it.

    Sums of INT8 products are exact in float64, which holds integers to 2^53.
    """
    if granularity(a, b, scale_a, scale_b) == "block":
        value = _blocks(a.double(), b.double(), scale_a.double(), scale_b.double()).float()
    else:
        total = a.double() @ b.double().t()
        value = scaled(total, scale_a, scale_b, zero_point, column_sum)
    rest = (bias, activation, gate, residual, out_dtype)
    return finished(with_low_rank(value, low_rank), *rest)


def _blocks(a, b, scale_a, scale_b) -> torch.Tensor:
    scale_b = scale_b.repeat_interleave(BLOCK, dim=0)[: b.shape[0]]
    total = a.new_zeros(a.shape[0], b.shape[0])
    for i in range(scale_a.shape[1]):
        columns = slice(i * BLOCK, (i + 1) * BLOCK)
        part = a[:, columns] @ b[:, columns].t()
        total += part * scale_a[:, i, None] * scale_b[None, :, i]
    return total


def scaled(total, scale_a, scale_b, zero_point, column_sum) -> torch.Tensor:
    """Return scale_a · scale_b · (total − zero_point · column_sum) in float32.

    total: [M, N] INT32, FP32 or FP64, the sums. One scale, or one per row, of each operand.
    """
    if zero_point is not None:
        total = total - zero_point.to(total.dtype)[:, None] * column_sum.to(total.dtype)[None, :]
    return total.float() * scale_a.reshape(-1, 1) * scale_b.reshape(1, -1)


def with_low_rank(value, low_rank) -> torch.Tensor:
    """Return value plus the low-rank term h·uᵀ, [M, N] float32; low_rank: h and u, or None."""
    if low_rank is None:
        return value
    h, u = low_rank
    return torch.addmm(value, h.float(), u.float().t())


def finished(value, bias, activation, gate, residual, out_dtype) -> torch.Tensor:
    """Return residual + gate · activation(value + bias), [M, N], in out_dtype; value is float32."""
    if bias is not None:
        value = value + bias.float()
    if activation == "gelu_tanh":
        value = F.gelu(value, approximate="tanh")
    if gate is not None:
        value = value * gate.float().repeat_interleave(value.shape[0] // gate.shape[0], dim=0)
    if residual is not None:
        value = value + residual.float()
    return value.to(out_dtype)


register(Backend(OP, "reference", 100, Needs(SCHEMES), run))
