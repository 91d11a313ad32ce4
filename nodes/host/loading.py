"""A checkpoint as a model in the host, quantized while it is read.

Files are read by this pack's own streaming reader and handed to the host's loader in the host's own
layout of tensors; afterwards each quantized weight is shown under our layout.
"""

import logging
import os
from collections.abc import Iterator

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.linear.arithmetic import AUTO
from ...quant import arithmetic, convert, families
from ...quant.checkpoint import Checkpoint, open_checkpoint
from ...quant.checkpoint.stored import (
    MARKER,
    check_can_stay,
    logical_shapes,
    marker_tensor,
    stored_layers,
)
from ...quant.record import LayerRecord, decode
from .. import stand_in
from ..inputs import AS_STORED
from .fusing import fuse
from .layers import ATTACHMENT, linears
from .linear import format_of, log_arithmetic, naming, show
from .memory import make_room
from .work import device, progress

logger = logging.getLogger(__name__)


def load_model(path, format_name, recipe_name, keep=(), wish=AUTO, disable_dynamic=False):
    """Return a ModelPatcher for the checkpoint at `path`, quantized while it is read.

    Raises what `convert.plan` and `convert.stream` raise, and ValueError when the host does not
    recognise the model.
    """
    import comfy.sd

    arithmetic.check(format_name, wish, device())
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
    for name, module in linears(patcher):
        fmt = formats_by_layer.get(name) or format_of(module)
        if fmt and not module._full_precision_mm_config:
            with naming(name):
                show(module, fmt, module.weight, wish, patcher.load_device)
            ours[name] = module
    fuse(patcher, patcher, ours)
    log_arithmetic(patcher, ours, wish)
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
    for name, tensor in convert.stream(work, device(), tick, make_room):
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
    payloads = {layer.parts["weight"]: layer.format.storage for layer in stored.values()}
    model = families.recognise(logical_shapes(checkpoint, stored))
    state = {
        model.host_name(parts.get(name, name)): _named(tensor, payloads.get(name))
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


def _named(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return plain bytes as the floats they are: of what is not, the host converts the values."""
    is_plain = dtype is not None and dtype.is_floating_point and tensor.dtype == torch.uint8
    return tensor.view(dtype) if is_plain else tensor


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
