"""Attention in NVFP4, both products: EXPERIMENTAL, its kernel has not run on a GPU that has them.

As SageAttention 3 describes it (arXiv 2505.11594): the mean key is taken off K, the mean query of
each tile off Q and added to the logits exactly; P has two levels of scales, one per row of a tile,
so that the E4M3 scales of its blocks use their whole range. It errs ten times as much as attention
in 8 bits. `reference` gives the same numerics on any device.
"""

import torch

from .. import registry
from .prepare import TILE

OP = "attention_fp4"
SCHEME = "nvfp4"
WIDTHS = (64, 128)
# Heads are computed some at a time, so that what the mean queries add to the logits, float32 of
# [heads, Lq / 128, Lk], stays within so much: a model's whole would be 7 GB at 75,600 tokens.
CORRECTION_BYTES = 1 << 29


def attention_fp4(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return nearly softmax(scale · q·kᵀ) · v, [B, H, Lq, D], in the dtype of q.

    q: [B, H, Lq, D]; k, v: [B, Hkv, Lk, D], H % Hkv = 0, D of WIDTHS, of one float dtype, never
    written to; none is empty. What a head gives depends on no other.
    scale: None is D**-0.5. backend: `auto` is the reference; the kernel runs when named.
    Raises ValueError on other inputs, NoBackendError when the backend cannot run them.
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"{OP}: q [B, H, Lq, D] and k, v [B, Hkv, Lk, D] are wanted, got {shapes}")
    empty = 0 in (q.numel(), k.numel())
    if empty or q.shape[3] not in WIDTHS or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{OP}: head sizes {WIDTHS} are taken, heads of q a multiple of k's, none empty; got "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    dtypes = {t.dtype for t in (q, k, v)}
    if len(dtypes) > 1 or not q.is_floating_point():
        names = ", ".join(str(t.dtype) for t in (q, k, v))
        raise ValueError(f"{OP}: q, k and v are of one floating-point dtype, got {names}")
    call = registry.Call(SCHEME, q.device, 0, q.shape[3])
    run = registry.select(OP, call, backend).run
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    group, step = q.shape[1] // k.shape[1], _kv_heads_at_a_time(q, k)
    parts = [
        run(
            q[:, first * group : (first + step) * group],
            *(x[:, first : first + step] for x in (k, v)),
            scale,
        )
        for first in range(0, k.shape[1], step)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _kv_heads_at_a_time(q: torch.Tensor, k: torch.Tensor) -> int:
    """Return how many heads of k, with those of q that share them, CORRECTION_BYTES suffice for."""
    tiles, group = -(-q.shape[2] // TILE), q.shape[1] // k.shape[1]
    of_head = q.shape[0] * group * tiles * (k.shape[2] + TILE) * 4
    return max(1, CORRECTION_BYTES // of_head)


registry.discover(__name__)
