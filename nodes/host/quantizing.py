"""A model of any loader, quantized: only by object patches on a clone of its `ModelPatcher`.

The host sets them and takes them back itself; the model that comes in stays as it is.
"""

import dataclasses
import uuid

from comfy_kitchen.tensor import QuantizedTensor

from ...ops.linear.arithmetic import AUTO
from ...quant import arithmetic, convert, families, formats, recipe
from ...quant.memory import quantize_within_memory
from ..inputs import AS_STORED
from .fusing import fuse
from .layers import ATTACHMENT, ROOT, base_weight, layer_records, linears, record
from .linear import format_of, log_arithmetic, naming, replacement
from .memory import make_room
from .work import progress


def quantize_model(patcher, format_name, recipe_name=recipe.AUTO, keep=(), wish=AUTO):
    """Return a clone of `patcher` whose linear layers are quantized, by object patches.

    wish: in which arithmetic 4 bits are multiplied. Raises ValueError for unknown names and when
    nothing would be quantized, NoBackendError when the wish cannot run on the model's device.
    """
    arithmetic.check(format_name, wish, patcher.load_device)
    modules = dict(linears(patcher))
    chosen = _choose(modules, patcher, format_name, recipe_name, keep)
    if not any(choice.format for choice in chosen.values()):
        raise ValueError(
            "the model has no quantized layers to keep as they are; choose a format"
            if format_name == AS_STORED
            else recipe.nothing_to_quantize(format_name, recipe_name, chosen.values())
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
            same = error is None
            with naming(name):
                device = patcher.load_device
                new_module = replacement(module, choice.format, new, same, wish, device)
            clone.add_object_patch(f"{ROOT}.{name}", new_module)
            ours[name] = new_module
            error = known[name].error if error is None else error
            before = known[name].size_bytes
            known[name] = record(name, new, choice.format, error, choice.reason)
            saved += before - known[name].size_bytes
        elif choice.reason:
            known[name] = dataclasses.replace(known[name], reason=choice.reason)
        bar.update(1)
    fuse(patcher, clone, ours)
    log_arithmetic(patcher, ours, wish)
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


def _quantized(patcher, name, module, fmt, tick) -> tuple[QuantizedTensor, float | None]:
    """Return a module's weight in `fmt` and its error, None where its bits are kept."""
    weight = base_weight(patcher, name, module)
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
