"""Queries, keys and values as models have them, of three kinds, for tests and benchmarks."""

import torch

D = 128
# Tokens of one cluster share an offset: so many clusters stand side by side.
CLUSTERS = 64
KEY_BIAS = 8.0
OUTLIER_STEP, OUTLIER = 37, 5.0
KINDS = ("normal", "bias", "outliers")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return normally distributed numbers on the GPU, the same for the same seed."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def make(kind: str, heads: int, queries: int, keys: int, seed: int = 0) -> list[torch.Tensor]:
    """Return q, k, v [1, H, L, 128] in bf16 that lie as [1, L, H, 128], as projections give them.

    kind: "normal"; "bias": tokens in clusters, a bias of each channel of K and V; "outliers": each
    37th channel is five times as large.
    """
    q, k, v = (
        normal(1, length, heads, D, seed=3 * seed + i).transpose(1, 2)
        for i, length in enumerate((queries, keys, keys))
    )
    if kind == "bias":
        q, k = _clustered(q, seed), _clustered(k, seed)
        k = k + KEY_BIAS * normal(1, heads, 1, D, seed=seed + 8)
        v = v + normal(1, heads, 1, D, seed=seed + 7)
    elif kind == "outliers":
        for x in (q, k, v):
            x[..., ::OUTLIER_STEP] *= OUTLIER
    return [q, k, v]


def _clustered(x: torch.Tensor, seed: int) -> torch.Tensor:
    offsets = normal(1, x.shape[1], CLUSTERS, D, seed=seed + 9)
    return x + offsets.repeat_interleave(-(-x.shape[2] // CLUSTERS), 2)[:, :, : x.shape[2]]


def exact(q, k, v, rows: slice, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the attention of some rows in float64, a head at a time. mask: bool, of keys."""
    heads = []
    for h in range(q.shape[1]):
        logits = q[0, h, rows].double() @ k[0, h].double().t() * D**-0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        heads.append(logits.softmax(1) @ v[0, h].double())
    return torch.stack(heads)[None]
