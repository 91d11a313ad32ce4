"""`attention` in plain torch, on any device: exact in float64, one head at a time."""

import torch

from ..registry import Backend, Needs, register
from . import OP, scheme
from .modes import MODES


def run(out, lse, q, k, v, mode, mask, causal: bool, scale: float) -> None:
    """Write to out and lse what `attention` describes. Every mode gives the exact result."""
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


SCHEMES = frozenset(scheme(mode, masked) for mode in MODES for masked in (False, True))
register(Backend(OP, "reference", 100, Needs(SCHEMES), run))
