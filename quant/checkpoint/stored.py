"""Quantized layers as files hold them, whoever wrote them.

Known markings: the host's `L.comfy_quant` tensors and `_quantization_metadata`, the legacy
`scaled_fp8` of the host and of WanVideoWrapper (`L.scale_weight`, `L.scale_input`), and FP8 weights
that carry a scale but no marking at all. Layers in other programs' words are `foreign`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .. import families, formats
from ..dialects import Reading
from ..formats._blocks import round_up
from ..record import decode
from .foreign import AGAIN, Foreign, Request, find_foreign
from .header import CheckpointError, TensorInfo, parse_json
from .reader import Checkpoint

MARKER = "comfy_quant"
METADATA_KEY = "_quantization_metadata"
LEGACY_FLAG = "scaled_fp8"
LEGACY_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
FP8_DTYPES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
SMOOTHING = "pre_quant_scale"
INPUT_SCALES = ("input_scale", SMOOTHING)
AS_IT_IS = Request()


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer of a file. `parts`: name within the layer, as the host has it → tensor.

    reading: how it comes to the host's words, None where it is in them. format: None where none of
    ours holds its numbers; `dequantize` gives them.
    """

    name: str
    format: formats.Format | None
    marker: Mapping[str, Any]
    marked_by: str
    parts: Mapping[str, str]
    shape: tuple[int, int] | None = field(default=None)
    reading: Reading | None = None

    @property
    def title(self) -> str:
        """The name of the format, or whose layout it is that has no format here."""
        return self.format.name if self.format else f"{self.reading.dialect}'s"

    def logical_shape(self, checkpoint: Checkpoint) -> tuple[int, int]:
        """Return [N, K] of the weight, unpacked."""
        n, k = checkpoint[self.parts["weight"]].shape
        return self.shape or (n, k * self.format.packed)

    def tensors(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Return the layer's tensors by part, in the host's words; see `Reading.convert`."""
        tensors = {part: checkpoint.read(name) for part, name in self.parts.items()}
        return self.reading.convert(tensors) if self.reading else tensors

    def load(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> QuantizedTensor:
        """Return the weight as stored. Raises CheckpointError that names the layer."""
        return self.unpack(checkpoint, self.tensors(checkpoint), dtype)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError as `load` would, for what names and shapes tell; reads nothing.

        Another program's layout was looked at when it was recognised.
        """
        if self.reading:
            return
        infos = {part: checkpoint[name] for part, name in self.parts.items()}
        tensors = {
            part: torch.empty(info.shape, dtype=info.dtype, device="meta")
            for part, info in infos.items()
        }
        self.unpack(checkpoint, tensors)

    def unpack(self, checkpoint, tensors, dtype=torch.float32) -> QuantizedTensor:
        """Return the weight in what `tensors` gave. Raises CheckpointError that names the layer."""
        try:
            return self.format.unpack(tensors, dtype, self.shape, self.marker)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint.path}: layer {self.name}: {error}; {AGAIN}"
            ) from error

    def dequantize(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Return the weight [N, K] in float32, with the smoothing of its input folded in."""
        tensors = self.tensors(checkpoint)
        weight = tensors["weight"]
        if self.format:
            weight = self.unpack(checkpoint, tensors).dequantize()
        if SMOOTHING in tensors:
            weight = weight * tensors[SMOOTHING].float().reshape(1, -1)
        return weight


def stored_layers(
    checkpoint: Checkpoint, request: Request = AS_IT_IS, notes: list[str] | None = None
) -> dict[str, StoredLayer]:
    """Return the quantized layers of a checkpoint by module name.

    request: what the user says of the file. notes: takes, in words, what was found out about it.
    Raises CheckpointError when a marking cannot be read or names an unknown format, or when it
    takes more than the file to say how a layer is read.
    """
    shapes = recorded_shapes(checkpoint)
    parts = parts_by_layer(checkpoint)
    markings = _markings(checkpoint, parts)
    spoken = {n: m for n, (m, by) in markings.items() if by in (MARKER, METADATA_KEY)}
    foreign = find_foreign(checkpoint, parts, spoken, request)
    layers = _foreign_layers(parts, spoken, foreign)
    if notes is not None and layers:
        notes.extend(foreign.notes)
    for name, (marker, marked_by) in markings.items():
        if name in layers:
            continue
        if "weight" not in parts.get(name, {}):
            raise CheckpointError(
                f"{checkpoint.path}: {name} is marked quantized but has no weight: the file is "
                f"incomplete; download it again, or {AGAIN}"
            )
        try:
            fmt = formats.from_marker(marker)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: layer {name}: {error}; {AGAIN}") from error
        named = {p: t for p, t in parts[name].items() if p not in (MARKER, "bias")}
        if len(checkpoint[named["weight"]].shape) != 2:
            raise CheckpointError(
                f"{checkpoint.path}: layer {name}: a quantized weight is [N, K], this one "
                f"{list(checkpoint[named['weight']].shape)}"
            )
        shape = _recorded(shapes, name) or _shape_from_bias(checkpoint, name, parts[name], fmt)
        layers[name] = StoredLayer(name, fmt, marker, marked_by, named, shape)
    for layer in layers.values():
        _check_smoothing(checkpoint, layer)
    return layers


def _check_smoothing(checkpoint: Checkpoint, layer: StoredLayer) -> None:
    """Raise CheckpointError where the input's smoothing is neither one value nor one per column."""
    _, k = layer.logical_shape(checkpoint)
    info = checkpoint.get(layer.parts.get(SMOOTHING))
    if info is not None and math.prod(info.shape) not in (1, k):
        raise CheckpointError(
            f"{checkpoint.path}: layer {layer.name}: {SMOOTHING} has shape {list(info.shape)}, "
            f"one for each of the {k} columns is wanted; {AGAIN}"
        )


def _foreign_layers(parts, markers, foreign: Foreign) -> dict[str, StoredLayer]:
    layers = {}
    for name, reading in foreign.readings.items():
        fmt, marker = reading.format, markers.get(name, {})
        if fmt and marker:
            # Rotation and precision are said by the marking alone.
            marker = {**fmt.marker, **marker, "format": fmt.marker["format"]}
        named = {p: t for p, t in parts[name].items() if p not in (MARKER, "bias")}
        marker = marker or (fmt.marker if fmt else {})
        by = reading.dialect
        layers[name] = StoredLayer(name, fmt, marker, by, named, reading.shape, reading)
    return layers


def check_can_stay(checkpoint: Checkpoint, stored: Mapping[str, StoredLayer]) -> None:
    """Raise CheckpointError when a file holds numbers that no format of ours holds.

    Or integers that nothing reads; and what `families.recognise` raises.
    """
    model = families.recognise(logical_shapes(checkpoint, stored))
    check_integers(checkpoint, stored, model)
    blocks = [info.encoding for info in checkpoint.values() if info.encoding]
    lost = [f"{layer.title} {name}" for name, layer in stored.items() if not layer.format]
    if blocks or lost:
        what = f"{blocks[0]} blocks of GGUF" if blocks else lost[0]
        raise CheckpointError(
            f"{checkpoint.path}: {what} cannot stay as stored: choose a format, to which it is "
            "quantized while it is read"
        )


def is_integer_matrix(info: TensorInfo) -> bool:
    """Return whether a tensor can only be a weight in some packing or other."""
    return len(info.shape) == 2 and not info.dtype.is_floating_point


def check_integers(
    checkpoint: Checkpoint, stored: Mapping[str, StoredLayer], model: families.Recognised
) -> None:
    """Raise CheckpointError when the model has a weight of integers that no layer of `stored` is.

    Taken for the weights themselves, they would be noise. Those of other models in the file, such
    as a text encoder, are not looked at.
    """
    for name in model.renamed:
        module, _, part = name.rpartition(".")
        info = checkpoint[name]
        if part != "weight" or module in stored or not is_integer_matrix(info):
            continue
        beside = sorted(n for n in checkpoint if n.startswith(f"{module}.") and n != name)
        others = ", ".join(n.removeprefix(f"{module}.") for n in beside) or "nothing"
        kind = str(info.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{checkpoint.path}: layer {module}: weight {kind} {list(info.shape)} with {others} "
            f"beside it is in no layout that LowBit reads; {AGAIN}"
        )


def logical_shapes(
    checkpoint: Checkpoint, stored: Mapping[str, StoredLayer]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by name, those of quantized weights unpacked."""
    shapes = {name: info.shape for name, info in checkpoint.items()}
    for layer in stored.values():
        shapes[layer.parts["weight"]] = layer.logical_shape(checkpoint)
    return shapes


def recorded_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return the logical shapes that this pack recorded for padded layers."""
    shapes = {name: entry.get("shape") for name, entry in decode(checkpoint.metadata).items()}
    return {name: tuple(shape) for name, shape in shapes.items() if _is_shape(shape)}


def _is_shape(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(type(v) is int and v > 0 for v in value)


def _recorded(shapes: Mapping[str, tuple[int, int]], module: str) -> tuple[int, int] | None:
    """Return the shape recorded for `module`; records lack the prefix of the file's names."""
    while module not in shapes and "." in module:
        module = module.partition(".")[2]
    return shapes.get(module)


def _shape_from_bias(checkpoint, name, parts: Mapping[str, str], fmt) -> tuple[int, int] | None:
    """Return [N, K], N from the bias, where the format pads rows; None: take what is stored.

    Raises CheckpointError where the rows beyond the bias are not what the format pads with.
    """
    if fmt.pad_multiple == 1 or "bias" not in parts or len(checkpoint[parts["bias"]].shape) != 1:
        return None
    n, k = checkpoint[parts["weight"]].shape
    rows = min(n, checkpoint[parts["bias"]].shape[0])
    if n not in (rows, round_up(rows, fmt.pad_multiple)):
        raise CheckpointError(
            f"{checkpoint.path}: layer {name}: its bias has {rows} elements, its weight {n} rows, "
            f"which is more than {fmt.name}'s padding to a multiple of {fmt.pad_multiple}"
        )
    return (rows, k * fmt.packed)


def parts_by_layer(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return module → part → tensor name, with legacy part names in the host's words."""
    parts: dict[str, dict[str, str]] = {}
    for name in checkpoint:
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[LEGACY_NAMES.get(part, part)] = name
    return parts


def _markings(checkpoint: Checkpoint, parts) -> dict[str, tuple[dict[str, Any], str]]:
    found = {}
    flags = [i for name, i in checkpoint.items() if name.rpartition(".")[2] == LEGACY_FLAG]
    # A flag of two elements asks for products in full precision.
    options = {"full_precision_matrix_mult": True} if any(i.shape == (2,) for i in flags) else {}
    for module, named in parts.items():
        if MARKER in named:
            found[module] = (read_marker(checkpoint, named[MARKER]), MARKER)
        elif "weight" in named and "weight_scale" in named:
            info = checkpoint[named["weight"]]
            if info.dtype in FP8_DTYPES:
                marker = {"format": fp8_name(checkpoint, named, info), **options}
                found[module] = (marker, LEGACY_FLAG if flags else "nothing")
    for module, marker in metadata_markers(checkpoint).items():
        # Names there may lack the prefix that the tensors bear.
        named = [p + module for p in ("", *families.PREFIXES) if p + module in parts]
        found[named[0] if named else module] = (marker, METADATA_KEY)
    return found


def fp8_name(checkpoint: Checkpoint, named, info) -> str:
    scale = checkpoint[named["weight_scale"]].shape
    rows = len(info.shape) == 2 and scale == (info.shape[0], 1) and info.shape[0] > 1
    return FP8_DTYPES[info.dtype] + ("_rowwise" if rows else "")


def read_marker(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return what a `comfy_quant` tensor says. Raises CheckpointError where it is no marker."""
    info, where = checkpoint[name], f"{checkpoint.path}: {name}"
    if info.dtype != torch.uint8 or len(info.shape) != 1:
        dtype = str(info.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{where} is {dtype} {list(info.shape)}, a marker is uint8 [bytes of its JSON]; {AGAIN}"
        )
    marker = parse_json(checkpoint.read(name).numpy().tobytes(), where)
    if not isinstance(marker, dict):
        raise CheckpointError(f"{where} is no JSON object")
    return marker


def metadata_markers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    text = checkpoint.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    content = parse_json(text, f"{checkpoint.path}: {METADATA_KEY}")
    try:
        layers = dict(content["layers"])
        if not all(isinstance(marker, dict) for marker in layers.values()):
            raise TypeError("a layer's entry is no JSON object")
        return layers
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path}: {METADATA_KEY} is malformed: {error}") from error


def marker_tensor(marker: Mapping[str, Any]) -> torch.Tensor:
    """Return a `comfy_quant` marker as the uint8 tensor that files hold."""
    return torch.tensor(list(json.dumps(dict(marker)).encode()), dtype=torch.uint8)
