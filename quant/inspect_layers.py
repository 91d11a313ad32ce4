"""The quantized layers of a checkpoint, marked or not, and what is wrong with each."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import formats
from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .checkpoint.foreign import names_modelopt
from .checkpoint.stored import (
    FP8_DTYPES,
    INPUT_SCALES,
    LEGACY_FLAG,
    MARKER,
    METADATA_KEY,
    fp8_name,
    is_integer_matrix,
    metadata_markers,
    parts_by_layer,
    read_marker,
)
from .dialects import RawLayer, find_orders
from .finite import not_finite
from .formats import Format
from .inspect_problems import HOST, PACK, Finding
from .record import RECORD_KEY
from .scale_order import SWIZZLED

INTEGERS = {torch.int8, torch.uint8}
# Part names beside `weight` that one reader or another takes; another "…scale…" is read by none.
KNOWN_SCALES = {"weight_scale", "weight_scale_2", *INPUT_SCALES}


@dataclass
class Layer:
    """A layer that is quantized, or looks so. format: None where no marking names one of ours."""

    name: str
    parts: dict[str, str]
    marker: dict[str, Any] = field(default_factory=dict)
    marked_by: str = ""
    format: Format | None = None


def find_layers(checkpoint: Checkpoint, findings: list[Finding]) -> dict[str, Layer]:
    """Return the layers that are marked, or hold FP8 or integers, by name."""
    layers = {}
    for name, parts in parts_by_layer(checkpoint).items():
        info = checkpoint.get(parts.get("weight"))
        if MARKER in parts:
            layers[name] = layer = Layer(name, parts, marked_by=MARKER)
            try:
                layer.marker = read_marker(checkpoint, parts[MARKER])
            except CheckpointError as error:
                findings.append(Finding("marker_unreadable", name, str(error)))
        elif info and _looks_quantized(info):
            layers[name] = Layer(name, parts)
    _mark_from_metadata(checkpoint, layers, findings)
    _mark_fp8(checkpoint, layers)
    for layer in layers.values():
        if layer.marked_by:
            findings.extend(_name_format(layer))
    return layers


def _looks_quantized(info: TensorInfo) -> bool:
    return info.dtype in FP8_DTYPES or is_integer_matrix(info)


def _mark_from_metadata(checkpoint, layers: dict[str, Layer], findings: list[Finding]) -> None:
    try:
        markers = metadata_markers(checkpoint)
    except CheckpointError as error:
        findings.append(Finding("marker_unreadable", "", str(error)))
        return
    parts = parts_by_layer(checkpoint)
    for name, marker in markers.items():
        if "weight" not in parts.get(name, {}):
            detail = f"{METADATA_KEY} names it, the file has no {name}.weight"
            findings.append(Finding("metadata_unknown_layer", name, detail))
        else:
            layers[name] = Layer(name, parts[name], marker, METADATA_KEY)


def _mark_fp8(checkpoint: Checkpoint, layers: dict[str, Layer]) -> None:
    """Mark FP8 layers that only have a scale, as this pack reads them."""
    flagged = any(name.rpartition(".")[2] == LEGACY_FLAG for name in checkpoint)
    for layer in layers.values():
        info = checkpoint.get(layer.parts.get("weight"))
        if layer.marked_by or info is None or info.dtype not in FP8_DTYPES:
            continue
        if "weight_scale" in layer.parts:
            layer.marker = {"format": fp8_name(checkpoint, layer.parts, info)}
            renamed = layer.parts["weight_scale"].endswith(".scale_weight")
            # The host honours the flag for `scale_weight` only, and not beside its own metadata.
            heeded = flagged and renamed and METADATA_KEY not in checkpoint.metadata
            layer.marked_by = LEGACY_FLAG if heeded else "nothing"


def _name_format(layer: Layer) -> Iterator[Finding]:
    """Set the format that the marker names; yield what the host or this pack does not know."""
    if not layer.marker and layer.marked_by not in (MARKER, METADATA_KEY):
        return
    name = layer.marker.get("format")
    affects = ()
    try:
        layer.format = formats.from_marker(layer.marker)
    except ValueError:
        affects = (PACK,)
    # A name that is no text cannot be looked up.
    name = name if isinstance(name, str) else repr(name)
    known = {f.marker["format"] for f in map(formats.get, formats.names()) if f.native}
    if layer.marked_by in (MARKER, METADATA_KEY) and name not in known:
        affects = (HOST, *affects)
    if affects:
        by = "its marking names" if HOST in affects else "by its tensors it is"
        yield Finding("unknown_format", layer.name, f"{by} {name!r}", affects)


def check(checkpoint: Checkpoint, layer: Layer) -> Iterator[Finding]:
    """Yield what is wrong with a layer, but for the order and the values of its scales."""
    if "weight" not in layer.parts:
        yield Finding("marker_without_weight", layer.name, f"{layer.name}.weight is not there")
        return
    info = checkpoint[layer.parts["weight"]]
    if not layer.marked_by:
        yield from _check_unmarked(checkpoint, layer, info)
        return
    if layer.marked_by == "nothing":
        detail = f"{layer.parts['weight_scale']} is there, {MARKER} is not"
        yield Finding("scale_ignored", layer.name, detail, (HOST,))
    if len(info.shape) != 2:
        yield Finding("payload_shape", layer.name, f"weight is {_words(info)}, [N, K] is wanted")
    elif layer.format:
        yield from _check_payload(layer, info)
        yield from _check_scales(checkpoint, layer)


def _check_unmarked(checkpoint, layer: Layer, info: TensorInfo) -> Iterator[Finding]:
    if is_integer_matrix(info):
        detail = f"{_words(info)} has no {MARKER}"
        if names_modelopt(checkpoint):
            detail += "; the metadata tells of ModelOpt, whose scales are flat and whose even "
            detail += "column is the low nibble"
        yield Finding("unmarked_integers", layer.name, detail)
        return
    foreign = [p for p in layer.parts if "scale" in p and p not in KNOWN_SCALES]
    if foreign:
        detail = f"{layer.name}.{foreign[0]} is read by neither"
        yield Finding("scale_ignored", layer.name, detail, (HOST, PACK))
    else:
        yield Finding("fp8_unscaled", layer.name, f"{_words(info)} has no scale")


def _check_payload(layer: Layer, info: TensorInfo) -> Iterator[Finding]:
    """Yield a payload whose dtype is not the format's: the host converts values.

    This pack takes plain bytes for what the marking says, and refuses the rest.
    """
    wanted = layer.format.storage
    detail = f"weight is {_words(info)}, {layer.format.name} wants {dtype_name(wanted)}"
    affects = (HOST, PACK)
    if layer.marked_by == LEGACY_FLAG:
        # The host takes every legacy layer for E4M3.
        wanted = torch.float8_e4m3fn
        detail, affects = f"weight is {_words(info)}, {LEGACY_FLAG} means float8_e4m3fn", (HOST,)
    elif info.dtype == torch.uint8:
        affects = (HOST,)
    same_bits = {info.dtype, wanted} <= INTEGERS
    if info.dtype != wanted and not same_bits:
        yield Finding("payload_dtype", layer.name, detail, affects)


def _check_scales(checkpoint: Checkpoint, layer: Layer) -> Iterator[Finding]:
    """Yield scales that are missing or of another shape than the format's."""
    fmt, parts = layer.format, layer.parts
    # Shapes and dtypes are enough, so tensors without memory show what the file holds.
    empty = {
        part: torch.empty(checkpoint[name].shape, dtype=checkpoint[name].dtype, device="meta")
        for part, name in parts.items()
        if part != MARKER
    }
    if mixed := fmt.mixed(empty):
        yield Finding("scale_kind", layer.name, f"marked {fmt.name}: {mixed}")
        return
    missing = [n for n in fmt.scales.values() if n not in parts and n not in fmt.optional]
    if missing:
        yield Finding("scale_missing", layer.name, f"{', '.join(missing)} not there")
        return
    if _is_channel_as_tensor(checkpoint, layer):
        shape = list(checkpoint[parts["weight_scale"]].shape)
        detail = f"weight_scale has shape {shape}, by its marking there is one scale per tensor"
        # Behind the legacy flag this pack goes by the shape of the scale.
        affects = (HOST, PACK) if fmt.native else (HOST,)
        yield Finding("per_channel_as_tensor", layer.name, detail, affects)
        return
    try:
        fmt.unpack(empty, torch.float32, None, layer.marker)
    except (ValueError, TypeError, RuntimeError) as error:
        yield Finding("scale_shape", layer.name, str(error))


def _is_channel_as_tensor(checkpoint: Checkpoint, layer: Layer) -> bool:
    fmt = layer.format
    if fmt.storage not in FP8_DTYPES or fmt.group or "weight_scale" not in layer.parts:
        return False
    rows = checkpoint[layer.parts["weight"]].shape[0]
    elements = math.prod(checkpoint[layer.parts["weight_scale"]].shape)
    return elements == rows > 1 and (fmt.native or layer.marked_by == LEGACY_FLAG)


def check_finite(checkpoint: Checkpoint, layer: Layer) -> Iterator[Finding]:
    """Yield scales that hold NaN or Inf."""
    names = {p for p in layer.parts if "scale" in p or p == "alpha"}
    names |= layer.parts.keys() & (set(layer.format.scales.values()) if layer.format else set())
    tensors = ((part, checkpoint.read(layer.parts[part])) for part in sorted(names))
    dtypes = layer.format.scale_dtypes if layer.format else {}
    for part, count in not_finite(tensors, dtypes):
        yield Finding("scale_not_finite", layer.name, f"{part} holds {count} NaN or Inf")


def check_order(checkpoint: Checkpoint, layers: dict[str, Layer]) -> Iterator[Finding]:
    """Yield samples of block-scaled layers whose scales are in another order, or seem to be."""
    scaled = [layer for layer in layers.values() if layer.format and layer.format.pad_multiple > 1]
    yield from _check_scale_order(checkpoint, scaled)
    for name in formats.names():
        found = [layer for layer in scaled if layer.format.name == name and layer.format.packed > 1]
        if found and names_modelopt(checkpoint):
            detail = "the metadata tells of ModelOpt"
            yield Finding("nibble_order_unknown", found[0].name, detail)


def _check_scale_order(checkpoint: Checkpoint, layers: list[Layer]) -> Iterator[Finding]:
    by_name = {layer.name: layer for layer in layers}

    def read(name: str, part: str) -> torch.Tensor:
        return checkpoint.read(by_name[name].parts[part])

    raw = (
        RawLayer(x.name, {p: checkpoint[t] for p, t in x.parts.items()}, x.marker) for x in layers
    )
    # Of a file of ours the order was known, or asked for.
    ours = RECORD_KEY in checkpoint.metadata
    try:
        # Another number of scales is found by their shape.
        found = find_orders((one for one in raw if _is_as_large_as_swizzled(one)), read, SWIZZLED)
    except CheckpointError as error:
        yield Finding("scale_order_doubtful" if ours else "scale_order", "", str(error))
        return
    for one in found:
        bad = one.order not in (None, SWIZZLED) and not ours
        for name, order in one.votes.items():
            if order == SWIZZLED:
                continue
            if bad:
                wanted = f"{by_name[name].format.name} wants it swizzled once"
                yield Finding("scale_order", name, f"weight_scale is {order}, {wanted}")
            else:
                yield Finding("scale_order_doubtful", name, f"weight_scale looks as if {order}")


def _is_as_large_as_swizzled(layer: RawLayer) -> bool:
    weight = layer.parts.get("weight")
    return weight is not None and len(weight.shape) == 2 and SWIZZLED in layer.orders()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _words(info: TensorInfo) -> str:
    return f"{dtype_name(info.dtype)} {list(info.shape)}"
