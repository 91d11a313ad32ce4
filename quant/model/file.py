"""Quantized models as files: one safetensors file, in the host's names, that loads there too.

Files are read a tensor at a time into a model that lies on the meta device, so that a checkpoint
can be quantized while it is read and the 16-bit model is never in memory as a whole.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

from ...ops.linear.arithmetic import AUTO, check_name
from ...ops.linear.four_bit import GROUPS
from ...ops.linear.modules import LowBitLinear
from .. import convert, families, formats, recipe
from ..arithmetic import check as check_arithmetic
from ..checkpoint import Checkpoint, CheckpointError, CheckpointWriter, open_checkpoint
from ..checkpoint.stored import (
    LEGACY_FLAG,
    MARKER,
    SMOOTHING,
    StoredLayer,
    check_can_stay,
    logical_shapes,
    marker_tensor,
    stored_layers,
)
from ..checkpoint.writer import ENTRY_BYTES
from ..recipe import Choice
from ..record import RECORD_KEY, LayerRecord, decode, encode
from .attention import running_device
from .configuration import CLASS_NAME, CONFIG_KEY, build
from .names import check_unwrapped, is_fused, names_of
from .quantize import Progress, fuse, guard, layer_records, stand_in, to_be_multiplied
from .swap import Swap, place

TENSORS_PER_LAYER = 6
FULL_PRECISION = "full_precision_matrix_mult"


@dataclass(frozen=True)
class Entry:
    """A tensor on its way into a model. name: the host's. record: of a quantized layer."""

    name: str
    tensor: torch.Tensor | QuantizedTensor
    record: LayerRecord | None = None


def save_model(model: nn.Module, path: str | os.PathLike, *, overwrite: bool = False) -> str:
    """Write `model`, quantized or not, as one safetensors file and return its path.

    Tensors bear the host's names: `load_model` and ComfyUI load the file, one without this pack
    too where the format is native there. The configuration of a diffusers model goes along.
    Raises CheckpointError when `path` exists and `overwrite` is false, when it does not end with
    .safetensors, or cannot be written; it is then absent or as it was. Raises ValueError, before
    anything is written, when a wrapper such as PEFT's or torch.compile's named the tensors.
    """
    path = os.fspath(path)
    if not path.endswith(".safetensors"):
        raise CheckpointError(f"{path}: the name must end with .safetensors")
    if os.path.exists(path) and not overwrite:
        raise CheckpointError(f"{path}: it exists; pass overwrite=True to replace it")
    check_unwrapped(model)
    names = names_of(model)
    records = [
        LayerRecord(names.layer(r.name), r.format, r.shape, r.size_bytes, r.error, r.reason)
        for r in layer_records(model)
        if not is_fused(r.name)
    ]
    found = names.recognised
    about = {"family": found.family.name, "variant": found.variant}
    metadata = {RECORD_KEY: encode(records, **about)}
    if hasattr(model, "config"):
        config = {**dict(model.config), CLASS_NAME: type(model).__name__}
        metadata[CONFIG_KEY] = json.dumps(config)
    room = {
        "names_bytes": TENSORS_PER_LAYER
        * sum(len(json.dumps(name)) + ENTRY_BYTES for name in names.host.values()),
        "metadata_bytes": len(json.dumps(metadata)),
    }
    with CheckpointWriter(path, **room) as writer:
        for name, tensor in model.state_dict().items():
            if not is_fused(name):
                for target, part in _parts(names.host[name], tensor):
                    writer.add(target, part)
        writer.finish(metadata)
    return path


def _parts(name: str, tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(tensor, QuantizedTensor):
        yield name, tensor
        return
    fmt, layer = formats.of(tensor), name.removesuffix(".weight")
    for part, stored in (fmt.pack(tensor) | {MARKER: marker_tensor(fmt.marker)}).items():
        yield f"{layer}.{part}", stored


def load_model(
    path: str | os.PathLike,
    model: nn.Module | str | os.PathLike | None = None,
    *,
    format: str | None = None,
    recipe: str = recipe.AUTO,
    keep: Iterable[str] = (),
    arithmetic: str = AUTO,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> nn.Module:
    """Return the model that a checkpoint holds, quantized layers as stored, in eval mode.

    path: a safetensors file, a folder of shards, or with `format` a GGUF file, in the host's names
    or diffusers'. model: what to fill, on any device, the meta device too; or a folder with
    diffusers' config.json; None: the configuration that `save_model` wrote, or the config.json in
    the folder `path`. format: quantize to it while reading, as `quantize_model` does; None: as
    stored. A layer that the file has in `format` stays as stored, unless it asks for more than a
    product: one of full precision becomes dense, one with its input smoothed is rounded again.
    arithmetic: in which nvfp4 and mxfp4 weights are multiplied, as `quantize_model` has it; files
    say nothing of it. dtype: of dense tensors, but for those that the model's class keeps in
    float32, and of what layers dequantize to. progress: called with (tensors done, all tensors).
    Raises CheckpointError when the file does not fit the model, naming what lacks, or the
    configuration is malformed or of a model larger than the file, before that is built; ValueError
    when it is missing or names no model of diffusers, and for an arithmetic where no layer has 4
    bits; NoBackendError for one that cannot run. A model that was given may then be half filled.
    """
    check_name(arithmetic)
    if format is not None:
        check_arithmetic(format, arithmetic, running_device(device))
    checkpoint = open_checkpoint(path)
    if format is None:
        entries, total = _as_stored(checkpoint, dtype), len(checkpoint)
    else:
        plan = convert.plan(checkpoint, format, recipe, keep)
        plan.steps = [_computable(step) for step in plan.steps]
        entries, total = _quantized(plan, dtype, device), len(plan.steps)
    if not isinstance(model, nn.Module):
        model = build(checkpoint, model)
    entries = _wishing(entries, arithmetic, device)
    _fill(model, entries, checkpoint.path, dtype, device, lambda done: progress(done, total))
    guard(model)
    return model.to(device).eval()


def _wishing(entries: Iterator[Entry], arithmetic: str, device) -> Iterator[Entry]:
    """Yield entries, those of 4 bits with the wish. Raises ValueError where there were none."""
    met = arithmetic == AUTO
    for entry in entries:
        if entry.record is not None:
            met = met or entry.tensor.layout_cls.scheme in GROUPS
            weight = to_be_multiplied(entry.tensor, arithmetic, device)
            entry = replace(entry, tensor=weight)
        yield entry
    if not met:
        raise ValueError(f"arithmetic {arithmetic}: the file has no layers of {', '.join(GROUPS)}")


def _as_stored(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Entry]:
    stored = stored_layers(checkpoint)
    check_can_stay(checkpoint, stored)
    consumed = {t for layer in stored.values() for p, t in layer.parts.items() if p != "weight"}
    model = families.recognise(logical_shapes(checkpoint, stored))
    errors = decode(checkpoint.metadata)
    for name in checkpoint:
        module, _, part = name.rpartition(".")
        host = model.renamed.get(name)
        if host is None or name in consumed or part in (MARKER, LEGACY_FLAG):
            continue
        if part == "weight" and module in stored:
            layer = stored[module]
            error = errors.get(host.removesuffix(".weight"), {}).get("error")
            yield _stored_entry(checkpoint, host, layer, dtype, error)
        else:
            yield Entry(host, checkpoint.read(name))


def _stored_entry(
    checkpoint: Checkpoint, host: str, layer: StoredLayer, dtype: torch.dtype, error: float | None
) -> Entry:
    if layer.marker.get(FULL_PRECISION):
        return Entry(host, layer.dequantize(checkpoint))
    if SMOOTHING in layer.parts:
        raise CheckpointError(
            f"{checkpoint.path}: {layer.name} wants its input smoothed, which only ComfyUI does; "
            "pass a format, to which it is rounded again, the smoothing folded in"
        )
    size = sum(checkpoint[t].size_bytes for t in layer.parts.values())
    shape, name = layer.logical_shape(checkpoint), host.removesuffix(".weight")
    record = LayerRecord(name, layer.format.name, shape, size, error, "as stored")
    return Entry(host, layer.load(checkpoint, dtype), record)


def _computable(step: convert.Step) -> convert.Step:
    """Return a step whose layer needs no more than a product with its weight.

    What would be copied but wants more of the host's Linear: smoothing goes into the weight, which
    is rounded again, and a layer that asks for products in full precision becomes dense.
    """
    if not step.is_copy:
        return step
    if step.stored.marker.get(FULL_PRECISION):
        why = "the file asks for products in full precision"
        return replace(step, choice=Choice(None, why))
    if SMOOTHING in step.stored.parts:
        why = "rounded again, the smoothing of its input folded in"
        return replace(step, choice=replace(step.choice, reason=why), anew=True)
    return step


def _quantized(plan: convert.Plan, dtype: torch.dtype, device) -> Iterator[Entry]:
    """Yield what `convert.stream` makes of a checkpoint, the tensors of a layer put together."""
    layers = {step.target: step for step in plan.layers}
    dense = {step.target for step in plan.steps} - layers.keys()
    known = set(plan.model.renamed.values())
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in convert.stream(plan, device):
        if name in dense:
            bare = name.removeprefix(plan.model.host_prefix)
            if bare in known:
                yield Entry(bare, tensor)
            continue
        module, _, part = name.rpartition(".")
        parts[part] = tensor
        # The marker comes last.
        if part == MARKER:
            step = layers[f"{module}.weight"]
            weight = step.choice.format.unpack(parts, dtype, step.shape, _marker(tensor))
            yield Entry(f"{step.layer}.weight", weight, plan.records[-1])
            parts = {}


def _marker(tensor: torch.Tensor) -> dict:
    return json.loads(bytes(tensor.tolist()))


def _fill(
    model: nn.Module,
    entries: Iterator[Entry],
    path: str,
    dtype: torch.dtype,
    device: torch.device | str,
    tick: Callable[[int], None],
) -> None:
    names = names_of(model)
    to_model = {host: name for name, host in names.host.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, unknown = set(to_model), []
    quantized: dict[str, nn.Module] = {}
    swap = Swap()
    for done, entry in enumerate(entries, start=1):
        name = to_model.get(entry.name)
        missing.discard(entry.name)
        if name is None:
            unknown.append(entry.name)
        elif shapes[name] != tuple(entry.tensor.shape):
            raise CheckpointError(
                f"{path}: {entry.name} is {list(entry.tensor.shape)}, the model has "
                f"{list(shapes[name])}"
            )
        elif entry.record is None:
            _set(model, name, _cast(model, name, entry.tensor, dtype).to(device))
        else:
            layer = name.removesuffix(".weight")
            quantized[layer] = _put(model, swap, layer, entry, device, path)
        tick(done)
    if missing or unknown:
        raise CheckpointError(
            f"{path}: the file lacks {sorted(missing)}, the model {sorted(unknown)}"
        )
    fuse(model, swap, names, quantized)


def _put(model, swap: Swap, layer: str, entry: Entry, device, path: str) -> nn.Module:
    spot = place(model, layer)
    if not isinstance(spot.module, nn.Linear):
        raise CheckpointError(f"{path}: {entry.name} is quantized, the model's is no Linear")
    if isinstance(spot.module, LowBitLinear):
        raise ValueError(f"{layer} of the model is quantized already; give a model that is not")
    # The bias may come later, into the new module.
    module = stand_in(spot.module, entry.tensor.to(device), entry.record)
    swap.put([spot], module)
    return module


def _cast(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as the model computes with it; what is no float stays as it is."""
    if not tensor.is_floating_point():
        return tensor
    exact = getattr(type(model), "_keep_in_fp32_modules", None) or ()
    return tensor.to(torch.float32 if any(part in name.split(".") for part in exact) else dtype)


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in module._parameters:
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor
