"""A low-rank term's first product as more columns of the FP8 activation beside it.

The product of the wider rows with the wider weight is then the layer's and the term's, in one sum.
"""

import torch

from .. import registry
from ..custom_op import custom_op
from ..scaled_mm.check import LOW_RANK

OP = "widen_rows"
E4M3 = torch.float8_e4m3fn


def widen_rows(
    h: torch.Tensor,
    stored: torch.Tensor,
    scale: torch.Tensor,
    scale_up: torch.Tensor,
    scale_weight: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """Return w, [M, R] E4M3: h · scale_up ≈ w · scale · scale_weight, row by row.

    With an `up` stored in units of scale_up, and a weight in units of scale_weight, w · upᵀ is in
    the units of stored · weightᵀ. h: [M, R] bf16 or fp16, contiguous rows. stored: [M, K] E4M3,
    contiguous; scale: [M, 1] float32. scale_up, scale_weight: one float32 element each.
    **`stored` and `scale` are written to** where a row of h is too large for E4M3 in these units:
    there scale grows by a power of two and stored shrinks by it, until h fits. What they stand for
    stays, but for what falls below the smallest E4M3. Nothing is cut off; a row of h that holds NaN
    or Inf makes its row of the product NaN, and leaves that of x to others who read it.
    Raises TypeError or ValueError on other inputs, NoBackendError when no backend can run them.
    """
    m = stored.shape[0]
    if h.dtype not in LOW_RANK or stored.dtype != E4M3:
        raise TypeError(f"widen_rows: h is {h.dtype}, stored {stored.dtype}; 16 bits and E4M3 only")
    if h.dim() != 2 or h.shape[0] != m or h.stride(1) != 1 or not h.shape[1]:
        raise ValueError(
            f"widen_rows: h is {list(h.shape)}; [{m}, R] with contiguous rows is wanted"
        )
    if scale.numel() != m or not scale.is_contiguous() or not stored.is_contiguous():
        raise ValueError(
            f"widen_rows: stored and its {m} scales, one per row, are to be contiguous"
        )
    if scale_up.numel() != 1 or scale_weight.numel() != 1:
        raise ValueError("widen_rows: one scale of up and one of the weight are wanted")
    return _OP(h, stored, scale, scale_up, scale_weight, backend)


def _run(h, stored, scale, scale_up, scale_weight, backend):
    call = registry.Call("fp8", stored.device, h.shape[1], stored.shape[1])
    run = registry.select(OP, call, backend).run
    return run(h, stored, scale, scale_up, scale_weight) if len(h) else _empty(h)


def _empty(h, *rest):
    return h.new_empty(h.shape, dtype=E4M3)


# A compiled graph, in which nothing is written to, gives it copies where others read the same rows.
_OP = custom_op(
    "widen_rows(Tensor h, Tensor(a!) stored, Tensor(b!) scale, Tensor scale_up, "
    "Tensor scale_weight, str backend) -> Tensor",
    _run,
    _empty,
)
registry.discover(__name__)
