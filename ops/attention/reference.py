"""`attention` in plain torch, on any device: exact in float64, one head at a time."""

import math

import torch

from ..registry import Backend, Needs, register
from . import KINDS, OP, scheme
from .modes import MODES
from .prepare import Prepared
from .prologue import NOTHING, TOKEN, Prologue

# Tokens that `applied` has in float32 at a time.
CHUNK = 4096


def applied(
    p: Prologue,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    heads: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x [B, H, L, D] after the steps of p, computed in float32, in its own dtype.

    weight: of x's norm. heads: those that are wanted, None: all. tokens: which these are, [L].
    """
    length, made = x.shape[2], []
    tokens = torch.arange(length, device=x.device) if tokens is None else tokens
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        chunk = prepared(x[:, :, part], weight, p, torch.float32, tokens[part]).to(x.dtype)
        made.append(chunk if heads is None else chunk[:, heads])
    return torch.cat(made, dim=2)


def prepared(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    p: Prologue,
    dtype: torch.dtype = torch.float64,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x [B, H, L, D] after the steps of p, in `dtype`.

    weight: of x's norm. tokens: which these are, [L]; None: the first ones.
    """
    length, d = x.shape[2:]
    tokens = torch.arange(length, device=x.device) if tokens is None else tokens
    x = x.to(dtype)
    if p.norm is not None:
        over = (1, 3) if p.norm == TOKEN else (3,)
        x = x / (x.square().mean(over, keepdim=True) + p.eps).sqrt()
    if weight is not None:
        rows = weight.to(dtype)
        rows = rows.expand(2, -1) if weight.dim() == 1 else rows
        second = (tokens >= p.first).long()
        # [L, heads or 1, D] -> [heads or 1, L, D].
        x = x * rows[second].view(length, -1, d).transpose(0, 1)
    if p.cos is not None:
        cos, sin = p.cos[tokens].to(dtype), p.sin[tokens].to(dtype)
        even, odd = x[..., ::2], x[..., 1::2]
        x = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return x


def of_copies(ready: Prepared, v: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """Return attention over Q, K and V as a mode stores them, [B · H, Lq, D] float64.

    What a kernel gives besides is P's rounding. ready: of `prepare`, not swizzled. v: [B, Hkv, Lk,
    D], which modes that store none of it read.
    """
    d, tile = v.shape[3], ready.k.shape[2]
    q = ready.q.flatten(1, 2)[:, :queries].double() * ready.q_scale[:, :queries, None].double()
    of_key = torch.arange(tile, device=v.device)
    of_key = of_key % 8 // 2 if ready.k_scale.shape[2] > 1 else of_key * 0
    k = (ready.k.double() * ready.k_scale.double()[:, :, of_key, None]).flatten(1, 2)[:, :keys]
    if ready.v is None:
        values = v.double().flatten(0, 1)
    else:
        # FP8 becomes float64 by float32 alone.
        stored = ready.v.float().double().transpose(2, 3).flatten(1, 2)[:, :keys, :d]
        scale, offset = (x[:, None, :d].double() for x in (ready.v_scale, ready.v_offset))
        values = stored * scale + offset
    group = len(q) // len(k)
    k, values = (x.repeat_interleave(group, 0) for x in (k, values))
    return (q @ k.mT * math.log(2)).softmax(-1) @ values


def run(out, lse, q, k, v, mode, mask, causal, scale, prologue=NOTHING, rotate=False) -> None:
    """Write to out and lse what `attention` describes. Every mode gives the exact result."""
    if prologue is not NOTHING:
        q = prepared(q, prologue.q_weight, prologue)
        k = prepared(k, prologue.k_weight, prologue)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = q[b, h].double() @ k[b, h // group].double().t() * scale
            if mask is not None and mask.dtype == torch.bool:
                logits = logits.masked_fill(~mask[b, h], -torch.inf)
            elif mask is not None:
                logits = logits + mask[b, h].double()
            if causal:
                later = torch.ones_like(logits, dtype=torch.bool).triu(1)
                logits = logits.masked_fill(later, -torch.inf)
            # The softmax of a row that no key counts for is NaN, and is to be zero.
            hidden = (logits == -torch.inf).all(dim=1, keepdim=True)
            p = logits.softmax(dim=1).masked_fill(hidden, 0)
            out[b, h] = (p @ v[b, h // group].double()).to(out.dtype)
            if lse is not None:
                lse[b, h] = logits.logsumexp(dim=1).float()


SCHEMES = frozenset(scheme(mode, kind) for mode in MODES for kind in KINDS)
register(Backend(OP, "reference", 100, Needs(SCHEMES), run))
