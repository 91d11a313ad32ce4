"""Quantizing a model of WanVideoWrapper: from the tensors of its file, or from merged weights.

The clone's layers hold their weights themselves: to the sampler it looks like a model whose LoRAs
were merged, so that block swap and offloading move it as a whole.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..ops.linear.arithmetic import AUTO, with_arithmetic
from ..ops.linear.four_bit import GROUPS
from ..quant import arithmetic, families, formats, fusion, recipe
from ..quant.checkpoint.stored import FP8_DTYPES, StoredLayer, logical_shapes, stored_layers
from ..quant.memory import quantize_within_memory
from . import host, wanvideo_model
from .host.linear import log_arithmetic, naming
from .host.memory import make_room
from .inputs import AS_STORED
from .wanvideo_linear import SideBranches, stand_in
from .wanvideo_model import COMPILED, TRANSFORMER

logger = logging.getLogger(__name__)

# Layers that the pack itself leaves as they are: low-rank layers and a controller of their own.
APART = ("loras", "dual_controller")
# What its sampler moves as blocks; all else by Parameters, which a quantized weight is not.
MOVED = ("blocks.", "vace_blocks.")
# Parameters that the pack keeps in float32, and those that stay so where the file has them so.
FLOAT32 = ("patch_embedding", "motion_encoder", "condition_embedding")
FLOAT32_AS_STORED = ("modulation", "norm")
SMOOTHING = "pre_quant_scale"
# The loader renames `weight_scale` wherever a name holds it.
SECOND_SCALE = (".scale_weight_2", ".weight_scale_2")


class Tensors(dict):
    """Tensors in memory, with what readers of files' markings ask of a checkpoint."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], path: str):
        super().__init__(tensors)
        self.path = path
        self.metadata: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        return self[name]


def quantize(patcher, format_name: str, recipe_name: str = recipe.AUTO, keep=(), wish: str = AUTO):
    """Return a clone of a WANVIDEOMODEL with quantized layers; `patcher` stays as it is.

    wish: in which arithmetic 4 bits are multiplied. Raises ValueError for unknown names, where
    nothing would be quantized, for GGUF models, and what `wanvideo_model.check` raises;
    NoBackendError when the wish cannot run on the model's device.
    """
    wanvideo_model.check(patcher)
    arithmetic.check(format_name, wish, patcher.load_device)
    if patcher.model.pipeline.get("gguf_reader") is not None:
        raise ValueError(
            "WanVideo: the weights of a GGUF file are quantized already. "
            "Load the safetensors file of the model instead."
        )
    tensors = _tensors(patcher.model)
    stored = stored_layers(tensors)
    chosen = _choose(tensors, stored, format_name, recipe_name, keep)
    clone = wanvideo_model.clone(patcher)
    transformer = getattr(clone.model, TRANSFORMER)
    custom_linear = wanvideo_model.class_of_pack(patcher, "custom_linear", "CustomLinear")
    home, dtype = patcher.offload_device, patcher.model["base_dtype"]
    layers = dict(_linears(transformer, tensors))
    bar, tick = host.progress(len(layers))
    ours = {}
    for name, module in layers.items():
        weight = _weight(tensors, stored.get(name), name, chosen[name], patcher, tick)
        with naming(name):
            weight = _to_be_multiplied(weight, wish, patcher.load_device)
        bias = tensors.get(f"{name}.bias")
        bias = None if bias is None else bias.to(home, dtype)
        new = stand_in(custom_linear, weight, bias, dtype)
        if isinstance(weight, QuantizedTensor):
            ours[name] = new
            if format_name == AS_STORED:
                new.full_precision = _asks_for_full_precision(module, stored.get(name))
        wanvideo_model.replace(transformer, name, new)
        bar.update(1)
    _fill(transformer, tensors, dtype, home)
    _fuse(transformer, ours, _family(tensors, stored))
    _tell_sampler(clone.model, transformer)
    counts = Counter(formats.of(module.weight).name for module in ours.values())
    logger.info("LowBit quantized WanVideo: %s of %d layers", dict(counts), len(layers))
    multiplied = {name: module for name, module in ours.items() if not module.full_precision}
    if multiplied or wish != AUTO:
        log_arithmetic(patcher, multiplied, wish)
    return clone


def _asks_for_full_precision(module: torch.nn.Module, stored: StoredLayer | None) -> bool:
    """Return whether a layer's file, or its own setting, wants products in the input's dtype."""
    if stored is None:
        return getattr(module, "full_precision", False)
    return bool(stored.marker.get("full_precision_matrix_mult"))


def _tensors(model) -> Tensors:
    """Return the model's tensors by name: those of its file, or merged ones."""
    state, path = model["sd"], str(model["base_path"])
    if state is not None:
        return Tensors({n.replace(*SECOND_SCALE): t for n, t in state.items()}, path)
    state = getattr(model, TRANSFORMER).state_dict()
    return Tensors({n.replace(f"{COMPILED}.", ""): t for n, t in state.items()}, path)


def _family(tensors: Tensors, stored: Mapping[str, StoredLayer]) -> families.Recognised:
    return families.recognise(logical_shapes(tensors, stored))


def _choose(tensors, stored, format_name, recipe_name, keep) -> dict[str, recipe.Choice]:
    """Return what happens to every layer, by name. Raises ValueError where nothing would."""
    shapes = logical_shapes(tensors, stored)
    names = {n.removesuffix(".weight"): s for n, s in shapes.items() if n.endswith(".weight")}
    if format_name == AS_STORED:
        kept = {n: layer.format for n, layer in stored.items()}
        chosen = {n: recipe.Choice(kept.get(n), AS_STORED) for n in names}
    else:
        rules = recipe.build(format_name, recipe_name, keep, _family(tensors, stored))
        chosen = {n: rules.choose(n, shape) for n, shape in names.items()}
    for name in chosen:
        if not name.startswith(MOVED) or any(part in name for part in APART):
            chosen[name] = recipe.Choice(None, "WanVideoWrapper does not move it with its block")
    if not any(choice.format for choice in chosen.values()):
        why = (
            "the model has no quantized layers to keep as they are; choose a format"
            if format_name == AS_STORED
            else recipe.nothing_to_quantize(format_name, recipe_name, chosen.values())
        )
        raise ValueError(f"WanVideo: {why}")
    return chosen


def _linears(transformer, tensors: Tensors) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yield (name, module) of the layers that the pack would give LoRAs to."""
    for name, module in list(transformer.named_modules()):
        apart = any(part in name for part in APART)
        if isinstance(module, torch.nn.Linear) and not apart and f"{name}.weight" in tensors:
            yield name, module


def _weight(tensors, stored: StoredLayer | None, name, choice, patcher, tick) -> torch.Tensor:
    """Return a layer's weight as `choice` says, on the offload device.

    Scales of the file are read as it has them, in float32; the pack would round them to 16 bits.
    """
    dtype, home = patcher.model["base_dtype"], patcher.offload_device
    if stored and choice.format is stored.format and SMOOTHING not in stored.parts:
        return stored.load(tensors).to(device=home).to(dtype=dtype)
    weight = stored.dequantize(tensors) if stored else tensors[f"{name}.weight"]
    if isinstance(weight, QuantizedTensor):
        # By an earlier node of ours.
        if choice.format in (None, formats.of(weight)):
            return weight
        weight = weight.dequantize()
    if not weight.is_floating_point():
        raise ValueError(
            f"WanVideo: layer {name} holds {weight.dtype}, and no tensor says in which format. "
            "Load the 16-bit file instead."
        )
    if not choice.format:
        return weight.to(home, dtype)
    if weight.dtype in FP8_DTYPES:
        weight = weight.to(dtype)
    try:
        device = patcher.load_device
        new, *_ = quantize_within_memory(choice.format, weight, device, tick, make_room)
    except formats.NotFiniteError as problem:
        raise formats.NotFiniteError(f"layer {name}: {problem}") from problem
    return new.to(device=home).to(dtype=dtype)


def _to_be_multiplied(weight: torch.Tensor, wish: str, device: torch.device) -> torch.Tensor:
    """Return a weight with the wish for its arithmetic, if it has 4 bits.

    wish: AUTO leaves the one that an earlier node gave it. device: where the layer will run.
    """
    is_quantized = isinstance(weight, QuantizedTensor)
    if wish == AUTO or not is_quantized or weight.layout_cls.scheme not in GROUPS:
        return weight
    return with_arithmetic(weight, wish, device)


def _fill(transformer, tensors: Tensors, dtype: torch.dtype, home: torch.device) -> None:
    """Give every parameter that still has no values those of the file, in the pack's dtype for it.

    Raises ValueError that names a parameter which the file lacks.
    """
    for prefix, module in transformer.named_modules():
        if isinstance(module, SideBranches):
            continue
        for last, parameter in module._parameters.items():
            name = f"{prefix}.{last}" if prefix else last
            if name in tensors:
                value = tensors[name]
                value = value.to(home, _dtype(name, value.dtype, dtype))
                module._parameters[last] = torch.nn.Parameter(value, requires_grad=False)
            elif parameter is not None and parameter.is_meta:
                raise ValueError(f"WanVideo: {tensors.path} has no tensor {name}")


def _dtype(name: str, stored: torch.dtype, base: torch.dtype) -> torch.dtype:
    """Return the dtype in which the pack computes with a parameter."""
    if any(part in name for part in FLOAT32):
        return torch.float32
    as_stored = stored == torch.float32 and any(part in name for part in FLOAT32_AS_STORED)
    return torch.float32 if as_stored else base


def _fuse(transformer, ours: Mapping[str, torch.nn.Module], model: families.Recognised) -> None:
    for readers in fusion.readers(ours, model.family):
        for layer in readers:
            layer.readers = len(readers)
    for name, record in fusion.feed_forwards(ours, model.family):
        plain = transformer.get_submodule(name)
        wanvideo_model.replace(transformer, name, fusion.fused(plain, record, _after_gelu))


def _after_gelu(module, x: torch.Tensor) -> torch.Tensor:
    return module.after_gelu(x)


def _tell_sampler(model, transformer) -> None:
    """Say to the sampler, as the loader does after merging LoRAs, that all weights are there."""
    model["sd"] = None
    model["scale_weights"] = {}
    model["quantization"] = "disabled"
    model["weight_dtype"] = model["base_dtype"]
    transformer.patched_linear = False
