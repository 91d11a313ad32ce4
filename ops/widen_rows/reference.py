"""`widen_rows` in plain torch, on any device."""

import torch

from ..registry import Backend, Needs, register
from . import E4M3, OP

LIMIT = torch.finfo(E4M3).max
# A row that is so much smaller than its h is nothing beside it, and its scale may be that of zeros.
MOST = 2.0**60


def run(h, stored, scale, scale_up, scale_weight) -> torch.Tensor:
    """Return w as `widen_rows` describes it."""
    value = h.float() * (scale_up.reshape(()) / scale_weight.reshape(()))
    old = scale.reshape(-1, 1)
    need = value.abs().amax(dim=1, keepdim=True) / LIMIT
    ratio = need / old
    grown = torch.where(ratio < MOST, old * torch.exp2(torch.ceil(torch.log2(ratio))), need)
    finite = need < torch.inf
    large = (need > old) & finite
    new = torch.where(large, grown, old)
    rows = large.flatten()
    stored[rows] = (stored[rows].float() * (old / new)[rows]).to(E4M3)
    old.copy_(new)
    return torch.where(finite, value / new, torch.nan).to(E4M3)


register(Backend(OP, "reference", 100, Needs(frozenset({"fp8"})), run))
