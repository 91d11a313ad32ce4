"""Models in the host: loaded, quantized, reported, and how our layers run there.

Files are read by this pack's own streaming reader and handed to the host's loader in the host's own
layout of tensors; afterwards each quantized weight is shown under our layout. A model from another
loader is changed only through object patches on a clone of its `ModelPatcher`, which the host sets
and takes back itself.
"""

import dataclasses
import logging
import os
import uuid
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.attention import router
from ...ops.linear import add_low_rank, linear
from ...ops.linear.activation import Kind, kind_of
from ...ops.linear.arithmetic import AUTO, arithmetic_of, with_arithmetic
from ...ops.linear.four_bit import GROUPS
from ...ops.registry import NoBackendError
from ...quant import arithmetic, convert, families, formats, fusion, recipe
from ...quant.checkpoint import Checkpoint, open_checkpoint
from ...quant.checkpoint.stored import (
    INPUT_SCALES,
    MARKER,
    check_can_stay,
    logical_shapes,
    marker_tensor,
    stored_layers,
)
from ...quant.memory import quantize_within_memory
from ...quant.record import LayerRecord, decode
from .. import stand_in
from ..attention_override import Override
from ..inputs import AS_STORED
from ..lora_terms import low_ranks_of
from . import clones
from .memory import make_room

logger = logging.getLogger(__name__)

ATTACHMENT = "lowbit_records"
ROOT = "diffusion_model"
# The key of transformer options under which the host looks for an override.
ATTENTION = "optimized_attention_override"


def load_model(path, format_name, recipe_name, keep=(), wish=AUTO, disable_dynamic=False):
    """Return a ModelPatcher for the checkpoint at `path`, quantized while it is read.

    Raises what `convert.plan` and `convert.stream` raise, and ValueError when the host does not
    recognise the model.
    """
    import comfy.sd

    arithmetic.check(format_name, wish, _device())
    checkpoint = open_checkpoint(path)
    if format_name == AS_STORED:
        state, records = _as_stored(checkpoint)
    else:
        work = convert.plan(checkpoint, format_name, recipe_name, keep)
        state, records = _streamed(work), work.records
    formats_by_layer = stand_in.disguise(state)
    # Layers are marked by tensors now; the host would let the header's word replace them.
    metadata = {k: v for k, v in checkpoint.metadata.items() if k != convert.METADATA_KEY}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        state, metadata=metadata, disable_dynamic=disable_dynamic
    )
    if patcher is None:
        raise ValueError(f"{path}: ComfyUI does not recognise the model")
    _check_loaded(patcher, path, records)
    ours = {}
    for name, module in _linears(patcher):
        fmt = formats_by_layer.get(name) or format_of(module)
        if fmt and not module._full_precision_mm_config:
            _show(module, fmt, module.weight, wish)
            ours[name] = module
    _fuse(patcher, patcher, ours)
    _log(patcher, ours, wish)
    arguments = (path, format_name, recipe_name, tuple(keep), wish)
    patcher.cached_patcher_init = (load_model, arguments)
    patcher.set_attachments(ATTACHMENT, list(records))
    return patcher


def _check_loaded(patcher, path: str, records) -> None:
    """Raise ValueError when a weight is missing, or a quantized one did not arrive as such."""
    modules = patcher.model.diffusion_model.named_modules()
    linears = {n: m for n, m in modules if hasattr(m, "in_features")}
    missing = [n for n, m in linears.items() if m.weight is None]
    if missing:
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first of {missing[0]}")
    arrived = {n for n, m in linears.items() if isinstance(m.weight, QuantizedTensor)}
    lost = [r.name for r in records if r.format and r.name not in arrived]
    if lost:
        raise ValueError(
            f"{path}: ComfyUI renames or fuses quantized layers of this file, {lost[0]} first; "
            "quantize the loaded model instead"
        )


def _streamed(work: convert.Plan) -> dict[str, torch.Tensor]:
    bar, tick = progress(len(work.steps))
    done = {step.target for step in work.steps}
    state = {}
    for name, tensor in convert.stream(work, _device(), tick, make_room):
        state[name] = tensor
        if name in done:
            bar.update(1)
    return state


def _as_stored(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], list[LayerRecord]]:
    """Return the tensors as the host maps them, under the names it knows, and the records."""
    stored = stored_layers(checkpoint, notes=(notes := []))
    for note in notes:
        logger.info("LowBit: %s: %s", checkpoint.path, note)
    check_can_stay(checkpoint, stored)
    for layer in stored.values():
        layer.check(checkpoint)
    foreign = {t for layer in stored.values() if layer.reading for t in layer.parts.values()}
    parts = {t: f"{n}.{p}" for n, layer in stored.items() for p, t in layer.parts.items()}
    model = families.recognise(logical_shapes(checkpoint, stored))
    state = {
        model.host_name(parts.get(name, name)): tensor
        for name, tensor in _tensors(checkpoint)
        if name.rpartition(".")[2] not in (convert.LEGACY_FLAG, MARKER) and name not in foreign
    }
    _, tick = progress(len(stored))
    for name, layer in stored.items():
        tick()
        words = layer.tensors(checkpoint) if layer.reading else {}
        for part, tensor in {**words, MARKER: marker_tensor(layer.marker)}.items():
            state[model.host_name(f"{name}.{part}")] = tensor
    return state, list(_stored_records(checkpoint, stored, model))


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor): mapped by the host where it is one file, else read shard by shard."""
    import comfy.utils

    if os.path.isfile(checkpoint.path) and not checkpoint.path.endswith(".json"):
        yield from comfy.utils.load_torch_file(checkpoint.path).items()
    else:
        yield from ((name, checkpoint.read(name)) for name in checkpoint)


def _stored_records(checkpoint: Checkpoint, stored, model) -> Iterator[LayerRecord]:
    """Yield a record per quantized layer, with the errors that this pack wrote into the file."""
    errors = decode(checkpoint.metadata)
    for name, layer in stored.items():
        size = sum(checkpoint[t].size_bytes for t in layer.parts.values())
        bare = model.host_name(name).removeprefix(model.host_prefix)
        shape = layer.logical_shape(checkpoint)
        error = errors.get(bare, {}).get("error")
        yield LayerRecord(bare, layer.format.name, shape, size, error, "as stored")


def _linears(patcher) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (name below the diffusion model, module) of every linear layer as `patcher` has it."""
    root = patcher.get_model_object(ROOT)
    for name, module in root.named_modules():
        module = patcher.get_model_object(f"{ROOT}.{name}") if name else module
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features") and weight is not None and weight.dim() == 2:
            yield name, module


def _marker(module) -> dict:
    """Return the `comfy_quant` marker of one of the host's quantized modules."""
    params = module.weight._params
    return {"format": module.quant_format, "convrot": getattr(params, "convrot", False)}


def _show(module, fmt: formats.Format, weight: QuantizedTensor, wish: str = AUTO) -> None:
    """Give a module, which nobody else holds, `weight` under our layout.

    wish: in which arithmetic 4 bits are multiplied; AUTO: the one that `weight` asks for already.
    """
    import comfy.quant_ops

    payload = weight._qdata.view(fmt.storage)
    quantized = QuantizedTensor(payload, fmt.layout.__name__, weight._params)
    if fmt.layout.scheme in GROUPS:
        wish = arithmetic_of(weight) if wish == AUTO else wish
        quantized = with_arithmetic(quantized, wish)
    module.weight = torch.nn.Parameter(quantized, requires_grad=False)
    module.quant_format = fmt.marker["format"]
    module.layout_type = quantized._layout_cls
    # Where the host would quantize the activation itself, take it as it is: our layouts do that.
    host_format = comfy.quant_ops.QUANT_ALGOS.get(fmt.stand_in or module.quant_format, {})
    module._full_precision_mm = host_format.get("quantize_input", True) and not _is_static(module)


def _is_static(module) -> bool:
    """Return whether the host quantizes a module's input for us: to FP8, with the file's scale."""
    scale = getattr(module, "input_scale", None)
    return scale is not None and kind_of(module.weight) == Kind(torch.float8_e4m3fn, 0)


def _fuse(patcher, clone, layers: dict[str, torch.nn.Module]) -> None:
    """Let `layers`, our own, share what they can in `clone`, which is `patcher` or of its kind."""
    state = patcher.get_model_object(ROOT).state_dict()
    family = families.recognise({n: tuple(v.shape) for n, v in state.items()}).family
    fusion.share_inputs(layers, family)
    for name, record in fusion.feed_forwards(layers, family):
        plain = patcher.get_model_object(f"{ROOT}.{name}")
        fused = fusion.fused(plain, record, _run_after_gelu)
        if fused is not plain:
            clone.add_object_patch(f"{ROOT}.{name}", fused)
    clones.watch(clone, _again)


def _again(module) -> torch.nn.Module:
    return _replacement(module, formats.of(module.weight), module.weight, scales_too=True)


def _log(patcher, layers: dict[str, torch.nn.Module], wish: str) -> None:
    """Say, once for a model, by which arithmetic `layers`, our own, run on its device.

    Raises ValueError where a wish is none of theirs, NoBackendError where it cannot run.
    """
    weights = [module.weight for module in layers.values()]
    if wish != AUTO and not any(arithmetic_of(weight) == wish for weight in weights):
        raise ValueError(f"arithmetic {wish}: the model has no layers of {', '.join(GROUPS)}")
    logger.info("LowBit layers: %s", arithmetic.summary(weights, patcher.load_device))


def _run_after_gelu(module, x: torch.Tensor) -> torch.Tensor:
    """Return module(gelu(x)) for one of the host's linear layers, in one pass where it is ours.

    What the host itself does to the input or the weight of a layer comes after the GELU.
    """
    import comfy.ops

    weight = module.weight
    ours = isinstance(weight, QuantizedTensor) and hasattr(weight.layout_cls, "scheme")
    if not ours or _is_static(module) or _is_patched(module):
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


def quantize_model(patcher, format_name, recipe_name=recipe.AUTO, keep=(), wish=AUTO):
    """Return a clone of `patcher` whose linear layers are quantized, by object patches.

    wish: in which arithmetic 4 bits are multiplied. Raises ValueError for unknown names and when
    nothing would be quantized, NoBackendError when the wish cannot run on the model's device.
    """
    arithmetic.check(format_name, wish, patcher.load_device)
    modules = dict(_linears(patcher))
    chosen = _choose(modules, patcher, format_name, recipe_name, keep)
    if not any(choice.format for choice in chosen.values()):
        raise ValueError(
            "the model has no quantized layers to keep as they are; choose a format"
            if format_name == AS_STORED
            else f"nothing to quantize to {format_name} under recipe {recipe_name}"
        )
    clone = patcher.clone()
    bar, tick = progress(len(modules))
    known = {r.name: r for r in layer_records(patcher)}
    saved = 0
    ours = {}
    for name, module in modules.items():
        choice = chosen[name]
        if choice.format:
            new, error = _quantized(patcher, name, module, choice.format, tick)
            new_module = _replacement(module, choice.format, new, error is None, wish)
            clone.add_object_patch(f"{ROOT}.{name}", new_module)
            ours[name] = new_module
            error = known[name].error if error is None else error
            before = known[name].size_bytes
            known[name] = _record(name, new, choice.format, error, choice.reason)
            saved += before - known[name].size_bytes
        elif choice.reason:
            known[name] = dataclasses.replace(known[name], reason=choice.reason)
        bar.update(1)
    _fuse(patcher, clone, ours)
    _log(patcher, ours, wish)
    # The clone's layers are others: without a new id the host would not load them.
    clone.patches_uuid = uuid.uuid4()
    clone.size = max(patcher.model_size() - saved, 1)
    clone.set_attachments(ATTACHMENT, list(known.values()))
    return clone


def _choose(modules, patcher, format_name, recipe_name, keep) -> dict[str, recipe.Choice]:
    if format_name == AS_STORED:
        return {n: _as_it_is(m) for n, m in modules.items()}
    state = patcher.get_model_object(ROOT).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    model = families.recognise(shapes)
    rules = recipe.build(format_name, recipe_name, keep, model)
    return {name: rules.choose(name, tuple(m.weight.shape)) for name, m in modules.items()}


def _as_it_is(module) -> recipe.Choice:
    fmt = format_of(module)
    if fmt and module._full_precision_mm_config:
        return recipe.Choice(None, "its file asks for products in full precision")
    return recipe.Choice(fmt, "as stored")


def format_of(module) -> formats.Format | None:
    """Return the format of a module's weight, under our layout or the host's, or None."""
    if not isinstance(module.weight, QuantizedTensor):
        return None
    return formats.from_marker(_marker(module))


def _base_weight(patcher, name: str, module) -> torch.Tensor:
    """Return a module's weight without patches: the host keeps it aside while one is applied."""
    import comfy.utils

    backup = patcher.backup.get(f"{ROOT}.{name}.weight")
    if backup is not None and comfy.utils.get_attr(patcher.model, f"{ROOT}.{name}") is module:
        return backup.weight
    return module.weight


def _quantized(patcher, name, module, fmt, tick) -> tuple[QuantizedTensor, float | None]:
    """Return a module's weight in `fmt` and its error, None where its bits are kept."""
    weight = _base_weight(patcher, name, module)
    if format_of(module) is fmt:
        # A layout of its own may say in which arithmetic the weight is multiplied.
        own = issubclass(weight.layout_cls, fmt.layout)
        layout = weight._layout_cls if own else fmt.layout.__name__
        return QuantizedTensor(weight._qdata, layout, weight._params), None
    home = weight.device
    if isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
        smoothing = getattr(module, "pre_quant_scale", None)
        if smoothing is not None:
            weight = weight.float() * smoothing.to(home).float().reshape(1, -1)
    elif weight.dtype in convert.FP8_DTYPES:
        weight = weight.to(convert.DENSE_DTYPE)
    try:
        new, error, _ = quantize_within_memory(fmt, weight, patcher.load_device, tick, make_room)
    except formats.NotFiniteError as problem:
        raise formats.NotFiniteError(f"layer {name}: {problem}") from problem
    # A weight whose logical dtype is not the one computed in would be dequantized by the host.
    dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    return new.to(device=home).to(dtype=dtype), error


def _replacement(module, fmt, weight, scales_too: bool, wish: str = AUTO) -> torch.nn.Module:
    """Return a Linear of the host's with `weight` and the bias of `module`.

    scales_too: with the scales of its input as well, which belong to the stored bits.
    """
    new = clones.operations(weight.dtype).Linear(
        module.in_features, module.out_features, bias=False, device="meta", dtype=weight.dtype
    )
    if module.bias is not None:
        # Another Parameter on the same memory: the host moves Parameters from device to device.
        new.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
    for extra in INPUT_SCALES if scales_too else ():
        value = getattr(module, extra, None)
        if value is not None:
            new.register_parameter(extra, torch.nn.Parameter(value.detach(), requires_grad=False))
    _show(new, fmt, weight, wish)
    return new.eval()


def _record(name, weight, fmt, error=None, reason="") -> LayerRecord:
    size = sum(t.nbytes for t in fmt.pack(weight).values()) if fmt else weight.nbytes
    return LayerRecord(name, fmt and fmt.name, tuple(weight.shape), size, error, reason)


def layer_records(patcher) -> list[LayerRecord]:
    """Return a record of every linear layer, with errors where this pack measured them."""
    known = {r.name: r for r in patcher.attachments.get(ATTACHMENT, [])}
    return [
        known.get(name) or _record(name, _base_weight(patcher, name, module), format_of(module))
        for name, module in _linears(patcher)
    ]


def set_attention(patcher, override: Override):
    """Return a clone of `patcher` that computes attention by `override`.

    Raises NoBackendError when its mode can run nothing on the GPU, or CPU, of the model.
    """
    from comfy.patcher_extension import WrappersMP

    if reason := router.missing(override.mode, patcher.load_device):
        raise NoBackendError(reason)
    clone = patcher.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    override.previous = options.get(ATTENTION)
    options[ATTENTION] = override
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "lowbit_attention", override.forward)
    return clone


def _device() -> torch.device:
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def progress(total: int):
    """Return the host's progress bar and a function that stops when the user interrupts."""
    import comfy.model_management
    import comfy.utils

    stop = comfy.model_management.throw_exception_if_processing_interrupted
    return comfy.utils.ProgressBar(max(total, 1)), stop
