"""Attention layers in the host whose norm and rotary embedding join our attention."""

import contextlib

import torch

from . import fused_attention

ROOT = "diffusion_model"


def fuse(patcher, clone) -> None:
    """Replace the attention layers in `clone`, of `patcher`, that are known, by object patches."""
    for name, module in patcher.get_model_object(ROOT).named_modules():
        # Children of the root are not modules that a patch replaces.
        key = f"{ROOT}.{name}"
        plain = patcher.get_model_object(key) if name else module
        fused = fused_attention.fused(plain, norm_weight)
        if fused is not plain:
            clone.add_object_patch(key, fused)


def norm_weight(norm: torch.nn.Module, like: torch.Tensor):
    """Return a context with (weight, None) of one of the host's norms, as its forward has it."""
    import comfy.ops

    if norm.comfy_cast_weights or norm.weight_function or norm.bias_function:
        return comfy.ops.CastBiasWeightContext(norm, like, offloadable=True)
    return contextlib.nullcontext((norm.weight, None))
