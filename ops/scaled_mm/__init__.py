"""The product of two 8-bit matrices, scaled: the arithmetic behind 8-bit linear layers."""

import torch

from .. import registry
from ..custom_op import custom_op
from .check import MADE_RANKS, Down, check, check_low_rank, is_few, scheme

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
    activation: str | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor | Down, torch.Tensor] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """Return residual + gate · activation(scale_a · scale_b · (a·bᵀ − point) + h·uᵀ + bias).

    The result is [M, N]. a: [M, K], b: [N, K], both INT8 (summed in INT32) or both FP8 (summed in
    FP32), K-contiguous, K % 16 = 0. Scales are float32: scale_a one or [M, 1] with scale_b one or
    [N, 1]; or one per block, scale_a [M, ⌈K/128⌉] of any strides with scale_b [⌈N/128⌉, ⌈K/128⌉],
    where each 128 columns of K are summed, scaled and added up in float32.
    zero_point: [M] int32, of a; column_sum: [N] int32, the sums of b along K; INT8 without blocks
    only; the point in the formula is zero_point · column_sum. low_rank: h [M, R] and u [N, R], both
    bfloat16 or both float16, contiguous rows, R > 0; or for h a `Down`, of which it is made, in the
    dtype of u, within the product where the backend can; None: without. bias: [N]. activation: None
    or `gelu_tanh`. gate: [R, N], R divides M: row i takes gate[i // (M / R)]. residual: [M, N],
    never written to. Bias, gate and residual: bfloat16, float16 or float32, as is out_dtype.
    Everything after the sums is float32, in the order of the formula, rounded once at the end.
    Raises TypeError or ValueError when arguments do not fit (`check.py`), NoBackendError when no
    backend can run them.
    """
    arguments = (a, b, scale_a, scale_b, bias, zero_point, column_sum, activation, gate, residual)
    check(*arguments, out_dtype)
    if low_rank is not None:
        check_low_rank(a, b, scale_a, scale_b, zero_point, *low_rank)
    h, u = low_rank or (None, None)
    h, *down = (None, *h) if isinstance(h, Down) else (h, None, None, None)
    return _OP(*arguments, h, u, *down, out_dtype, backend)


def _run(
    a,
    b,
    scale_a,
    scale_b,
    bias,
    point,
    column_sum,
    activation,
    gate,
    residual,
    low_a,
    low_b,
    down,
    scale_down,
    shift,
    out_dtype,
    backend,
):
    few = point is not None or is_few(a.shape[0], 0 if low_b is None else low_b.shape[1])
    name = scheme(a, b, scale_a, scale_b)
    call = registry.Call(name, a.device, b.shape[0], b.shape[1], few=few)
    chosen = registry.select(OP, call, backend)
    if a.shape[0] == 0 or b.shape[0] == 0:
        return _empty(a, b, out_dtype)
    rest = (bias, point, column_sum, activation, gate, residual, out_dtype)
    if down is not None and chosen.projects and len(down) <= MADE_RANKS:
        low_a = Down(down, scale_down, shift)
    elif down is not None:
        # Narrow, and so not always of the kind that the chosen backend takes.
        name = "auto" if chosen.projects else backend
        low_a = _run(a, down, scale_a, scale_down, shift, *[None] * 10, low_b.dtype, name)
    low_rank = None if low_a is None else (low_a, low_b)
    return chosen.run(a, b, scale_a, scale_b, *rest, low_rank)


def _empty(a, b, out_dtype):
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


_OP = custom_op(
    "scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, "
    "Tensor? zero_point, Tensor? column_sum, str? activation, Tensor? gate, Tensor? residual, "
    "Tensor? low_a, Tensor? low_b, Tensor? down, Tensor? scale_down, Tensor? shift, "
    "ScalarType out_dtype, str backend) -> Tensor",
    _run,
    lambda a, b, *rest: _empty(a, b, rest[-2]),
)
# From here on, `torch` is this package's backend of that name.
registry.discover(__name__)
