"""Norms of the host, for those who compute them elsewhere."""

import contextlib

import torch


def norm_weight(norm: torch.nn.Module, like: torch.Tensor):
    """Return a context with (weight, None) of one of the host's norms, as its forward has it."""
    import comfy.ops

    if norm.comfy_cast_weights or norm.weight_function or norm.bias_function:
        return comfy.ops.CastBiasWeightContext(norm, like, offloadable=True)
    return contextlib.nullcontext((norm.weight, None))
