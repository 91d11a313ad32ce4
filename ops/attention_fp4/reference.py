"""`attention_fp4` in plain torch, on any device: the kernel's numerics, tile by tile of keys."""

import torch

from ..registry import Backend, Needs, register
from . import OP, SCHEME
from .prepare import P_MAX, prepare, quantize

# Keys of one tile, over which a row of P has one first-level scale; as the kernel's.
KEYS = 64


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Return what `attention_fp4` describes; products and sums are float32."""
    prepared = prepare(q, k, v)
    group, keys, length = q.shape[1] // k.shape[1], k.shape[2], q.shape[2]
    left, right, values = (x.dequantize() for x in prepared[:3])
    right, values = (x.repeat_interleave(group, dim=0) for x in (right, values))
    logits = (left @ right.transpose(1, 2)).unflatten(1, (prepared.correction.shape[1], -1))
    logits = (logits + prepared.correction.unsqueeze(2)).flatten(1, 2)[:, :length]
    logits = logits * (prepared.logit_scale * scale).view(-1, 1, 1)
    logits[..., keys:] = -torch.inf
    largest = logits.amax(dim=-1, keepdim=True)
    out = total = 0
    for start in range(0, keys, KEYS):
        tile = logits[..., start : start + KEYS]
        here = tile.amax(dim=-1, keepdim=True)
        p = torch.exp(tile - here)
        outer = torch.exp(here - largest)
        rounded = quantize(p * P_MAX).dequantize()
        product = rounded @ values[..., start : start + KEYS].transpose(1, 2)
        out = out + product * (outer / P_MAX)
        total = total + p.sum(dim=-1, keepdim=True) * outer
    v_scale = prepared.v_scale.repeat_interleave(group).view(-1, 1, 1)
    return (out / total * v_scale).to(q.dtype).view(q.shape)


register(Backend(OP, "reference", 100, Needs(frozenset({SCHEME})), run))
