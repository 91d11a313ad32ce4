"""Q, K and V in NVFP4 as `tl.dot_scaled` reads them: even columns low, scales not swizzled."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..block_scales import E4M3, pack_e2m1, unpack_e2m1
from ..rounding import GRIDS, SMALLEST_SCALE

GROUP = 16
# Rows of Q that share a mean, and the multiple to which keys are padded.
TILE = 128
E2M1_MAX = GRIDS["e2m1"][2]
E4M3_MAX = torch.finfo(E4M3).max
P_MAX = E2M1_MAX * E4M3_MAX


class Quantized(NamedTuple):
    """stored: [..., K/2] uint8; scale: [..., K/16] E4M3. The scale of a head is apart."""

    stored: torch.Tensor
    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Return the values [..., K], float32."""
        swapped = (self.stored << 4 | self.stored >> 4).flatten(0, -2)
        values = unpack_e2m1(swapped).view(*self.scale.shape, GROUP)
        return (values * self.scale.float().unsqueeze(-1)).flatten(-2)


class Prepared(NamedTuple):
    """Heads are [B · H] or [B · Hkv]; queries are padded to tiles of 128, keys to 128.

    q: [heads, rows, D]. k: [heads, keys, D]. v: [heads, D, keys]. correction: [heads, tiles, keys]
    float32, what each tile's mean query adds to the logits. logit_scale: [B · H]; v_scale: [B ·
    Hkv]; float32: a head's real logits are stored · logit_scale, real values stored · v_scale.
    """

    q: Quantized
    k: Quantized
    v: Quantized
    correction: torch.Tensor
    logit_scale: torch.Tensor
    v_scale: torch.Tensor


def quantize(values: torch.Tensor) -> Quantized:
    """Return values [..., K] in NVFP4, K a multiple of 16, blocks along K, nearest.

    A block of zeros, or one whose scale rounds to zero, is zero. Magnitudes beyond 2,688 saturate.
    """
    blocks = values.float().unflatten(-1, (-1, GROUP))
    scale = (blocks.abs().amax(dim=-1) / E2M1_MAX).clamp_max(E4M3_MAX).to(E4M3)
    real = scale.float().unsqueeze(-1)
    scaled = torch.where(real == 0, 0, blocks / real).clamp(-E2M1_MAX, E2M1_MAX)
    magnitude = scaled.abs()
    # Steps are 0.5 below 2, 1 below 4, then 2; ties go to even multiples of the step.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.copysign(torch.round(magnitude / step) * step, scaled).flatten(-2)
    packed = pack_e2m1(rounded.flatten(0, -2)).view(*rounded.shape[:-1], -1)
    return Quantized(packed << 4 | packed >> 4, scale)


def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Prepared:
    """Return what the product takes of q [B, H, Lq, D] and k, v [B, Hkv, Lk, D]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.float().flatten(0, 1) for t in (q, k, v))
    k, k_scale = _normalized(_padded(k - k.mean(dim=1, keepdim=True)))
    # Rows of padding repeat the last, that the mean of its tile is one of queries.
    more = -q.shape[1] % TILE
    tiles = torch.cat([q, q[:, -1:].expand(-1, more, -1)], dim=1).unflatten(1, (-1, TILE))
    # With the mean still on: rows that are all alike leave nothing to measure the scale by.
    tiles, q_scale = _normalized(tiles)
    means = tiles.mean(dim=2)
    correction = means @ k.repeat_interleave(group, dim=0).transpose(1, 2)
    values, v_scale = _normalized(_padded(v).transpose(1, 2))
    rows = (tiles - means.unsqueeze(2)).flatten(1, 2)
    stored = (quantize(x) for x in (rows, k, values))
    logit_scale = q_scale * k_scale.repeat_interleave(group)
    return Prepared(*stored, correction, logit_scale, v_scale)


def _normalized(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values / scale, scale [heads]): the largest of each head as NVFP4 holds at most."""
    largest = values.abs().flatten(1).amax(dim=1)
    scale = (largest / P_MAX).clamp_min(SMALLEST_SCALE)
    return values / scale.view(-1, *[1] * (values.dim() - 1)), scale


def _padded(tokens: torch.Tensor) -> torch.Tensor:
    return F.pad(tokens, (0, 0, 0, -tokens.shape[1] % TILE))
