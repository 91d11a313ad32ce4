"""Layers of ours that share work in the host: one quantized input, a GELU in the same pass."""

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.linear import add_low_rank, linear
from ...quant import families, formats, fusion
from ..lora_terms import low_ranks_of
from . import clones
from .layers import ROOT
from .linear import is_static, replacement


def fuse(patcher, clone, layers: dict[str, torch.nn.Module]) -> None:
    """Let `layers`, our own, share what they can in `clone`, which is `patcher` or of its kind."""
    state = patcher.get_model_object(ROOT).state_dict()
    family = families.recognise({n: tuple(v.shape) for n, v in state.items()}).family
    fusion.share_inputs(layers, family)
    for name, record in fusion.feed_forwards(layers, family):
        plain = patcher.get_model_object(f"{ROOT}.{name}")
        fused = fusion.fused(plain, record, _run_after_gelu)
        if fused is not plain:
            clone.add_object_patch(f"{ROOT}.{name}", fused)
    watch(clone)


def watch(clone) -> None:
    """Have each further clone of `clone` get modules of its own in place of ours."""
    clones.watch(clone, _again)


def _again(module) -> torch.nn.Module:
    return replacement(module, formats.of(module.weight), module.weight, scales_too=True)


def _run_after_gelu(module, x: torch.Tensor) -> torch.Tensor:
    """Return module(gelu(x)) for one of the host's linear layers, in one pass where it is ours.

    What the host itself does to the input or the weight of a layer comes after the GELU.
    """
    import comfy.ops

    weight = module.weight
    ours = isinstance(weight, QuantizedTensor) and hasattr(weight.layout_cls, "scheme")
    if not ours or is_static(module) or _is_patched(module):
        return module(F.gelu(x, approximate="tanh"))
    comfy.ops.run_every_op()
    cast = comfy.ops.CastBiasWeightContext(
        module,
        dtype=weight.dtype,
        device=x.device,
        bias_dtype=x.dtype,
        offloadable=True,
        compute_dtype=x.dtype,
        want_requant=not module._full_precision_mm,
    )
    terms = low_ranks_of(module, x)
    with cast as (weight, bias):
        if isinstance(weight, QuantizedTensor):
            first = terms.pop(0) if terms else None
            out = linear(x, weight, bias, input_act="gelu_tanh", low_rank=first)
        else:
            out = F.linear(F.gelu(x, approximate="tanh"), weight.to(x.dtype), bias)
    for term in terms:
        out = add_low_rank(out, F.gelu(x, approximate="tanh"), term)
    return out


def _is_patched(module) -> bool:
    """Return whether somebody has a say in a layer's weight, its input, or its whole call."""
    functions = (*module.weight_function, *module.bias_function)
    hooks = (*module._forward_hooks, *module._forward_pre_hooks)
    # ComfyUI's bypass LoRAs assign to it.
    forward = "forward" in vars(module)
    forced = getattr(module, "comfy_force_cast_weights", False)
    smoothed = getattr(module, "pre_quant_scale", None) is not None
    return bool(functions or hooks or forward or forced or smoothed)
