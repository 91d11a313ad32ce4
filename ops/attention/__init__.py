"""Attention in 8 bits: INT8 Q·Kᵀ with the mean key taken off, and P·V in 16 bits, FP8 or INT8.

`modes.py` says what each mode computes and how exactly, `prepare.py` what the kernels read.
"""

import torch

from .. import registry
from ..custom_op import custom_op
from .check import check
from .modes import MODES
from .prologue import ARGUMENTS, NOTHING, Prologue, of_arguments

__all__ = ["Prologue", "attention", "scheme"]

OP = "attention"
# What hides keys: one mask for all queries, the order of the tokens, or anything.
KEYS, CAUSAL, MASKED = "keys", "causal", "masked"
KINDS = (None, KEYS, CAUSAL, MASKED)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mode: str = "exact",
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    prologue: Prologue = NOTHING,
    rotate: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scale · q·kᵀ + mask) · v, [B, H, Lq, D], in the dtype of q.

    q: [B, H, Lq, D]; k, v: [B, Hkv, Lk, D] with H % Hkv = 0, all bf16 or fp16, any strides (a
    [B, L, H, D] tensor is given transposed), never written to; the result lies in memory as q does.
    mode: a key of MODES. mask: bool (True: the key counts) or added to the logits, broadcast to
    [B, H, Lq, Lk]; where keys end early in all of a batch, shorter views of k and v do, without a
    mask and without a copy. causal: a query sees the keys up to its own index. scale: positive;
    None is D**-0.5. return_lse: also the natural log-sum-exp of the logits, [B, H, Lq] float32.
    prologue: norms and rotary embedding of q and k, done as they are quantized. rotate: q and k are
    multiplied by a Hadamard matrix before rounding, which q·kᵀ does not see: it spreads channels
    that are larger than the others.
    A row for which no key counts gives zeros, and -inf. NaN in a row of q reaches that row; NaN in
    k or v reaches the rows or channels of its head. In a mask that is added -inf hides a key; NaN
    and +inf give NaN in the rows that see the key.
    How many rows there are in all, and on which GPU, may change the last bits of a row.
    Raises ValueError or TypeError on other inputs, NoBackendError when no backend can run them.
    """
    check(q, k, v, mode, mask, scale)
    if prologue is not NOTHING:
        prologue.check(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    steps = prologue.arguments
    out, lse = _OP(q, k, v, mask, mode, causal, scale, return_lse, backend, rotate, *steps)
    return (out, lse) if return_lse else out


def scheme(mode: str, kind: str | None) -> str:
    """Return the name under which backends register what they can do; kind: one of KINDS."""
    return f"{mode}_{kind}" if kind else mode


def kind_of(mask: torch.Tensor | None, causal: bool) -> str | None:
    """Return what hides keys, one of KINDS."""
    if mask is None:
        return CAUSAL if causal else None
    of_keys = mask.dim() < 2 or mask.shape[-2] == 1
    return KEYS if of_keys and not causal else MASKED


def empty_out(q: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor like q whose tokens and heads lie in memory in q's order."""
    b, h, length, d = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(b, length, h, d).transpose(1, 2)
    return q.new_empty(b, h, length, d)


def _run(q, k, v, mask, mode, causal, scale, return_lse, backend, rotate, *steps):
    # Any number of keys: a call is remembered, and lengths vary.
    call = registry.Call(scheme(mode, kind_of(mask, causal)), q.device, 0, q.shape[-1])
    run = registry.select(OP, call, backend).run
    out, lse = _empty(q, k, v, mask, mode, causal, scale, return_lse, backend)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    prologue = of_arguments(*steps)
    wanted = lse if return_lse else None
    run(out, wanted, q, k, v, MODES[mode], mask, causal, scale, prologue, rotate)
    return out, lse


def _empty(q, k, v, mask, mode, causal, scale, return_lse, backend, *steps):
    shape = q.shape[:3] if return_lse else (0,)
    return empty_out(q), torch.empty(shape, dtype=torch.float32, device=q.device)


_OP = custom_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, str mode, bool causal, float scale, "
    f"bool return_lse, str backend, bool rotate, {ARGUMENTS}) -> (Tensor, Tensor)",
    _run,
    _empty,
)
registry.discover(__name__)
