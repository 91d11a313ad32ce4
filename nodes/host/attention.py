"""Attention in the host: an override in a model's options, and layers that leave it more to do."""

import contextlib

import torch

from ...ops.attention import router
from ...ops.registry import NoBackendError
from .. import fused_attention
from ..attention_override import OVERRIDE, Override
from . import fusing
from .layers import ROOT


def set_attention(patcher, override: Override):
    """Return a clone of `patcher` that computes attention by `override`.

    Raises NoBackendError when its mode can run nothing on the GPU, or CPU, of the model.
    """
    from comfy.patcher_extension import WrappersMP

    if reason := router.missing(override.mode, patcher.load_device):
        raise NoBackendError(reason)
    clone = patcher.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    override.previous = options.get(OVERRIDE)
    options[OVERRIDE] = override
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "lowbit_attention", override.forward)
    fuse(patcher, clone)
    return clone


def fuse(patcher, clone) -> None:
    """Replace the attention layers in `clone`, of `patcher`, that are known, by object patches."""
    for name, _ in patcher.get_model_object(ROOT).named_modules():
        if not name:
            continue
        plain = patcher.get_model_object(f"{ROOT}.{name}")
        fused = fused_attention.fused(plain, norm_weight)
        if fused is not plain:
            clone.add_object_patch(f"{ROOT}.{name}", fused)
    fusing.watch(clone)


def norm_weight(norm: torch.nn.Module, like: torch.Tensor):
    """Return a context with (weight, None) of one of the host's norms, as its forward has it."""
    import comfy.ops

    if norm.comfy_cast_weights or norm.weight_function or norm.bias_function:
        return comfy.ops.CastBiasWeightContext(norm, like, offloadable=True)
    return contextlib.nullcontext((norm.weight, None))
