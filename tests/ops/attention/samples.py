"""What the pre-pass takes of the keys and values as a sample, and makes of it, in torch."""

import torch

from lowbit.ops.attention import prepass


def sampled(keys: int) -> torch.Tensor:
    """The tokens of the sample: one of each of as many parts, somewhere in it."""
    total = min(keys, prepass.SAMPLE)
    i = torch.arange(total)
    begin, end = i * keys // total, (i + 1) * keys // total
    return begin + ((i * 2654435761 % 2**32 >> 16) * (end - begin) >> 16)


def unsampled(keys: int) -> int:
    """A token that is not in the sample."""
    taken = set(sampled(keys).tolist())
    return next(n for n in range(keys) if n not in taken)


def center(x: torch.Tensor) -> torch.Tensor:
    """Where most of the sample of x [..., keys, D] is, [..., D], in float32 or float64."""
    x = x[..., sampled(x.shape[-2]).to(x.device), :]
    parts = x.to(torch.promote_types(x.dtype, torch.float32)).split(prepass.SURVEY_TOKENS, -2)
    means = torch.stack([part.mean(-2) for part in parts])
    if len(means) < 3:
        return means.mean(0)
    triples = len(means) // 3
    return means[: 3 * triples].unflatten(0, (3, triples)).median(0).values.mean(0)
