"""Layers of ours that share work in the host: one quantized input, steps in the same pass."""

import itertools
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.linear import (
    LowRank,
    QuantizedActivation,
    input_kind,
    linear,
    linear_with_terms,
    quantize_activation,
)
from ...quant import families, formats, fusion
from .. import fused
from ..fused.base import Host, Modulated, gated
from ..lora_terms import add_terms, low_ranks_of
from . import clones
from .layers import ROOT
from .linear import is_static, replacement
from .norms import norm_weight

logger = logging.getLogger(__name__)


def fuse(patcher, clone, layers: dict[str, torch.nn.Module]) -> None:
    """Let `layers`, our own, share what they can in `clone`, which is `patcher` or of its kind."""
    root = patcher.get_model_object(ROOT)
    state = root.state_dict()
    family = families.recognise({n: tuple(v.shape) for n, v in state.items()}).family
    fusion.share_inputs(layers, family)
    for name, record in fusion.feed_forwards(layers, family):
        key = f"{ROOT}.{name}"
        plain = patcher.get_model_object(key)
        joined = fusion.fused(plain, record, _run_after_gelu, _is_lent(patcher, key))
        if joined is not plain and not _others_on(patcher, key):
            clone.add_object_patch(key, joined)
    _warn_of_compiled(clone)
    replace(patcher, clone, fused.BLOCKS)


def replace(patcher, clone, known: dict) -> None:
    """Give `clone`, of `patcher`, copies of the layers that are known, by object patches.

    A layer that another node patches stays, as the host would give both back in the wrong order.
    """
    left = []
    for key, plain in _modules(patcher, ROOT, patcher.model.diffusion_model):
        fusion.forget_copy(plain)
        joined = fused.fused(plain, known, HOST)
        if joined is plain:
            continue
        if _others_on(patcher, key) or not _has_own_forward(patcher, key, plain):
            left.append(key)
        else:
            clone.add_object_patch(key, joined)
    if left:
        logger.warning(
            "LowBit: another node changes %s%s: steps beside attention and products run there as "
            "ComfyUI has them. Put that node after LowBit's to have both",
            *(left[0], f" and {len(left) - 1} layers like it" if left[1:] else ""),
        )
    clones.watch(clone, _again)


def _modules(patcher, above: str, module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (key, module) of all below `module` as `patcher` has them.

    Whatever other clones have put there meanwhile, and nothing within what other nodes have.
    """
    for name, child in module._modules.items():
        key = f"{above}.{name}"
        child = patcher.object_patches_backup.get(key, child)
        child = patcher.object_patches.get(key, child)
        if isinstance(child, torch.nn.Module):
            yield key, child
            if isinstance(child, fusion.Fused) or key not in patcher.object_patches:
                yield from _modules(patcher, key, child)


def _others_on(patcher, key: str) -> bool:
    """Return whether a node patches an attribute, such as `forward`, of the layer at `key`."""
    return any(
        place.rpartition(".")[0] == key and not isinstance(value, torch.nn.Module)
        for place, value in patcher.object_patches.items()
    )


def _has_own_forward(patcher, key: str, plain: torch.nn.Module) -> bool:
    """Return whether nobody assigned to a layer's `forward` for good."""
    return _is_lent(patcher, key) or fusion.has_own_forward(plain)


def _is_lent(patcher, key: str) -> bool:
    """Return whether a layer's `forward` is that of a clone that is loaded, and goes with it."""
    return f"{key}.forward" in patcher.object_patches_backup


def _warn_of_compiled(patcher) -> None:
    from comfy.patcher_extension import WrappersMP

    if patcher.wrappers.get(WrappersMP.APPLY_MODEL, {}).get("torch.compile"):
        logger.warning(
            "LowBit: the model is compiled already, and its blocks stay as they were then: put the "
            "compiling node after LowBit's"
        )


def _again(module) -> torch.nn.Module:
    return replacement(module, formats.of(module.weight), module.weight, scales_too=True)


def _cast(parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    import comfy.model_management

    return comfy.model_management.cast_to(parameter, dtype=like.dtype, device=like.device)


def _run_after_gelu(module, x: torch.Tensor) -> torch.Tensor:
    return run(module, x, "gelu_tanh", None, None)


def run(
    module,
    x: torch.Tensor | QuantizedActivation,
    act: str | None,
    gate: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Return residual + gate · module(act(x)) for one of the host's linear layers.

    In one pass where the layer is ours. x: [..., K]; a quantized one for a layer that is ours, and
    act None. gate: [B, T, N], each for L / T tokens; residual: [B, L, N]; or neither. What the host
    itself does to the input or the weight of a layer comes after the act.
    """
    if not _is_direct(module):
        return _gated(module(_acted(x, act)), gate, residual)
    return _run(module, x, act, gate, residual, low_ranks_of(module, x))


def _run(module, x, act, gate, residual, terms: list[LowRank]) -> torch.Tensor:
    """Return what `run` does for a layer that is ours, with these terms of LoRAs."""
    import comfy.ops

    comfy.ops.run_every_op()
    weight = module.weight
    cast = comfy.ops.CastBiasWeightContext(
        module,
        dtype=weight.dtype,
        device=x.device,
        bias_dtype=x.dtype,
        offloadable=True,
        compute_dtype=x.dtype,
        want_requant=not module._full_precision_mm,
    )
    with cast as (weight, bias):
        if isinstance(weight, QuantizedTensor):
            gates = {"gate": gate if gate is None else gate.flatten(0, 1), "residual": residual}
            if terms:
                return linear_with_terms(x, weight, bias, terms, input_act=act, **gates)
            return linear(x, weight, bias, input_act=act, **gates)
        given = _acted(x.dequantize() if isinstance(x, QuantizedActivation) else x, act)
        out = F.linear(given, weight.to(x.dtype), bias)
    if terms:
        out = add_terms(module, out, given, terms)
    return _gated(out, gate, residual)


def _acted(x: torch.Tensor, act: str | None) -> torch.Tensor:
    return x if act is None else F.gelu(x, approximate="tanh")


def _gated(out: torch.Tensor, gate, residual) -> torch.Tensor:
    return out if residual is None else gated(residual, out, gate)


def run_after(modules, given: Modulated) -> tuple[torch.Tensor, ...]:
    """Return each linear layer's result for the same input, quantized once where all are ours.

    With LoRAs too, where their first matrices multiply what their layers do.
    """
    x = given.x
    if all(_is_direct(module) and not _is_patched(module) for module in modules):
        sizes = x.device, x.shape[0] * x.shape[1]
        terms = [low_ranks_of(module, x) for module in modules]
        kinds = {input_kind(module.weight, *sizes) for module in modules}
        (kind,) = kinds if len(kinds) == 1 else (None,)
        if kind is not None and all(term.multiplies(kind) for term in itertools.chain(*terms)):
            rounded = quantize_activation(x, modules[0].weight, prologue=given.steps)
            pairs = zip(modules, terms, strict=True)
            return tuple(_run(module, rounded, None, None, None, its) for module, its in pairs)
    plain = given.plain()
    return tuple(module(plain) for module in modules)


def _is_patched(module) -> bool:
    """Return whether a LoRA of the host's acts on a layer under dynamic VRAM: on floats."""
    return getattr(module, "weight_lowvram_function", None) is not None


def _is_direct(module) -> bool:
    """Return whether a layer is ours and nobody else has a say in its weight, input, or call."""
    weight = module.weight
    if not isinstance(weight, QuantizedTensor) or not hasattr(weight.layout_cls, "scheme"):
        return False
    hooks = {*module._forward_hooks, *module._forward_pre_hooks} - {fusion.HOOK}
    functions = module.weight_function or module.bias_function
    # ComfyUI's bypass LoRAs assign to it.
    forward = not fusion.has_own_forward(module)
    forced = getattr(module, "comfy_force_cast_weights", False)
    smoothed = getattr(module, "pre_quant_scale", None) is not None
    return not (functions or hooks or forward or forced or smoothed or is_static(module))


HOST = Host(norm_weight, _cast, run, run_after)
