"""Which layers of a checkpoint are not in the host's words, and how each of them is read.

What one dialect alone can have written is read; what several can is refused with the command that
names it, and so is what none has.
"""

import contextlib
import itertools
import logging
import math
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import dialects, families, formats
from ..dialects import BOTH, RawLayer, Reading
from ..record import RECORD_KEY
from ..scale_order import EITHER, FLAT, SWIZZLED, TWICE
from .header import CheckpointError, TensorInfo
from .reader import Checkpoint

logger = logging.getLogger(__name__)

FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}
INTEGERS = {torch.int8, torch.uint8}
METADATA_OF_MODELOPT = ("quantization_config", "hf_quant_config")
CONFIGURATIONS = ("config.json", "hf_quant_config.json")
# What is left to do with a file that nothing mends.
AGAIN = "quantize the 16-bit file with `lowbit quantize`"
SOURCE_WORDS = {order: word for word, order in dialects.ORDERS.items()}


class AmbiguousError(CheckpointError):
    """Several programs write such tensors in different ways; the message names the commands."""


@dataclass(frozen=True)
class Request:
    """What the user says of a file. source: a dialect; order: of block scales, a key of `ORDERS`.

    With both, the order is that of the layers which the dialect can have written, but for marked
    formats whose scales show that they are as marked, unless all do.
    """

    source: str | None = None
    order: str | None = None


@dataclass
class Foreign:
    """The layers that are read another way, and what was found out about the file, in words."""

    readings: dict[str, Reading] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_foreign(
    checkpoint: Checkpoint,
    parts: Mapping[str, Mapping[str, str]],
    markers: Mapping[str, Mapping[str, Any]],
    request: Request,
) -> Foreign:
    """Return how the foreign layers of `checkpoint` are read; see `Request`.

    parts: layer → part → tensor name. markers: layer → what its marking says; layers that are only
    taken for FP8, because they have a scale, are none of them. Raises AmbiguousError that names the
    layer and the commands where it can be read in several ways, CheckpointError where in none.
    """
    raw = {
        name: RawLayer(name, {p: checkpoint[t] for p, t in named.items()}, markers.get(name, {}))
        for name, named in parts.items()
        if _is_candidate(checkpoint.get(named.get("weight")))
    }
    result = Foreign()
    lying = _lying(raw.values())
    order = dialects.ORDERS[request.order] if request.order else None
    asked = {name for name, layer in raw.items() if _is_asked(layer, request)}
    if request.source and order not in (None, SWIZZLED):
        scaled = [x for n, x in raw.items() if n in asked and x.orders()]
        others = [x for x in scaled if not _names_itself(x, request)]
        known = _as_marked(checkpoint, parts, others, len(scaled))
        asked -= known
        if known:
            result.notes.append(
                f"{len(known)} layers are read as they are marked: their block scales show it"
            )
    found = []
    for kind in itertools.product((True, False), repeat=2):
        group = [x for n, x in raw.items() if (bool(x.marker), n in asked) == kind]
        marked, is_asked = kind
        found += _find_orders(checkpoint, parts, group, marked, order if is_asked else None)
    orders = {name: one.order for one in found for name in one.layers}
    for layer in raw.values():
        order, of = orders.get(layer.name), lying.get(_likeness(layer))
        known = replace(layer, order=order, lying=of)
        if reading := _read(checkpoint, known, request):
            result.readings[layer.name] = reading
    if request.source and request.source not in {r.dialect for r in result.readings.values()}:
        raise CheckpointError(f"{checkpoint.path}: no layer of it is as {request.source} writes it")
    for one in found:
        if one.order:
            result.notes.append(f"block scales are {one.order}: {one.how}")
        if one.against:
            logger.warning("LowBit: %s", _doubt(checkpoint.path, one))
    return result


def _is_candidate(info: TensorInfo | None) -> bool:
    return info is not None and len(info.shape) == 2 and info.dtype in FP8 | INTEGERS


def _likeness(layer: RawLayer) -> tuple[str, torch.dtype]:
    """Return what layers have in common that one program wrote in one way: model and payload."""
    prefix = next(prefix for prefix in families.PREFIXES if layer.name.startswith(prefix))
    return prefix, layer.parts["weight"].dtype


def _lying(layers: Iterable[RawLayer]) -> dict[tuple[str, torch.dtype], str]:
    """Return of what scales in one line are where others show it, which a square weight does not.

    By `_likeness`; layers that contradict each other show nothing.
    """
    shown = defaultdict(set)
    for layer in layers:
        if layer.scales_are_of not in (None, BOTH):
            shown[_likeness(layer)].add(layer.scales_are_of)
    return {like: one for like, (one, *more) in shown.items() if not more}


def _is_asked(layer: RawLayer, request: Request) -> bool:
    """Return whether the order that the user names is that of this layer's block scales."""
    if not request.order or not request.source or not layer.has_block_scales:
        return bool(request.order)
    # Other formats of the file may lie otherwise.
    ways = (replace(layer, order=order) for order in dialects.ORDERS.values())
    return any(dialects.readings(way, request.source) for way in ways)


def _names_itself(layer: RawLayer, request: Request) -> bool:
    """Return whether the user names the very format that a layer is marked as."""
    return layer.marker.get("format") == request.source


def _as_marked(
    checkpoint: Checkpoint,
    parts: Mapping[str, Mapping[str, str]],
    layers: Iterable[RawLayer],
    asked: int,
) -> set[str]:
    """Return which of `layers` are of a marked format whose scales all show its order.

    asked: for how many layers the user names another one; none of them are, if all would be.
    """
    right: set[str] = set()
    for alike in dialects.by_kind(x for x in layers if x.marker).values():
        # What contradicts itself shows nothing.
        with contextlib.suppress(CheckpointError):
            (found,) = dialects.find_orders(alike, _reader(checkpoint, parts), SWIZZLED)
            right |= set(found.layers) if found.order == SWIZZLED and not found.against else set()
    return right if len(right) < asked else set()


def _reader(
    checkpoint: Checkpoint, parts: Mapping[str, Mapping[str, str]]
) -> Callable[[str, str], torch.Tensor]:
    return lambda layer, part: checkpoint.read(parts[layer][part])


def _find_orders(
    checkpoint: Checkpoint,
    parts: Mapping[str, Mapping[str, str]],
    group: Iterable[RawLayer],
    marked: bool,
    asked: str | None,
) -> list[dialects.Found]:
    if marked and not asked and RECORD_KEY in checkpoint.metadata:
        # This pack wrote it, in an order that was known, or asked for.
        return []
    expected = SWIZZLED if marked else FLAT if names_modelopt(checkpoint) else None
    try:
        return dialects.find_orders(group, _reader(checkpoint, parts), expected, asked)
    except dialects.OrderError as error:
        command = _convert_with(checkpoint.path, error.orders)
        raise AmbiguousError(f"{checkpoint.path}: {error}. Say it: {command}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _doubt(path: str, found: dialects.Found) -> str:
    """Return that some layers look as if their scales lay in another order than those of a file."""
    (name, order), *others = found.against.items()
    more = f" and of {len(others)} more layers" if others else ""
    seen = dict.fromkeys(found.against.values())
    orders = (FLAT, TWICE) if EITHER in seen else seen
    return (
        f"{path}: the block scales of {name}{more} look as if {order}, as tiles or a diagonal "
        f"in a weight can make them; they are read as {found.order or SWIZZLED}. If pictures are "
        f"noise, say that they are not: {_convert_with(path, orders)}"
    )


def _convert_with(path: str, orders: Iterable[str]) -> str:
    options = " or ".join(f"`--scales {SOURCE_WORDS[order]}`" for order in orders)
    return f"`lowbit convert {shlex.quote(path)} DST` with {options}"


def names_modelopt(checkpoint: Checkpoint) -> bool:
    """Return whether the metadata, or the configuration in a folder of shards, names ModelOpt."""
    texts = [checkpoint.metadata.get(key, "") for key in METADATA_OF_MODELOPT]
    if os.path.isdir(checkpoint.path):
        for name in CONFIGURATIONS:
            with contextlib.suppress(OSError, ValueError):
                texts.append(Path(checkpoint.path, name).read_text(encoding="utf-8"))
    return any("modelopt" in text.lower() for text in texts)


def _read(checkpoint: Checkpoint, layer: RawLayer, request: Request) -> Reading | None:
    """Return how a foreign layer is read; None for one that is in the host's words, or plain."""
    wrong = _is_out_of_order(layer)
    either = wrong and layer.order == EITHER
    if request.source and (ways := _ways(layer, request.source)):
        if len(ways) > 1 and either:
            raise AmbiguousError(_ambiguous(checkpoint.path, layer, ways))
        return ways[0][0]
    if _is_the_hosts(layer) or not _has_scales(layer):
        return None
    ways = _ways(layer)
    certain = [reading for reading, _ in ways if reading.certain]
    if len(certain) == 1 and not either:
        return certain[0]
    if request.source and not (layer.marker and wrong):
        # Nothing of it is this source's, nor known: who needs the layer refuses it.
        return None
    if ways:
        raise AmbiguousError(_ambiguous(checkpoint.path, layer, ways))
    if (layer.marker and not wrong) or _is_plain_fp8(layer):
        # The marking itself is what is wrong, which loading the layer tells.
        return None
    raise _unreadable(checkpoint, layer)


def _ways(layer: RawLayer, source: str | None = None) -> list[tuple[Reading, str | None]]:
    """Return the readings of a layer, each with the order of its scales if that has to be said."""
    if layer.order == EITHER and _is_out_of_order(layer):
        orders = (FLAT, TWICE)
        layers = [replace(layer, order=order) for order in orders]
        return [(r, one.order) for one in layers for r in dialects.readings(one, source)]
    order = layer.order if layer.marker and layer.order in SOURCE_WORDS else None
    return [(reading, order) for reading in dialects.readings(layer, source)]


def _is_out_of_order(layer: RawLayer) -> bool:
    """Return whether a layer has block scales, and in another order than the host's."""
    return layer.order not in (None, SWIZZLED) and bool(replace(layer, order=None).orders())


def _unreadable(checkpoint: Checkpoint, layer: RawLayer) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: layer {layer.name}: {_words(layer)} is in no layout that LowBit "
        f"reads; {AGAIN}"
    )


def _is_the_hosts(layer: RawLayer) -> bool:
    """Return whether a layer is as its marking says, which may be the one of plain scaled FP8."""
    marker = layer.marker
    if not marker:
        scale = layer.parts.get("weight_scale")
        single = scale is not None and math.prod(scale.shape) == 1
        n = layer.shape[0]
        e4m3 = layer.parts["weight"].dtype == torch.float8_e4m3fn
        rows = scale is not None and scale.shape == (n, 1) and n > 1
        return _is_plain_fp8(layer) and (single or (rows and e4m3))
    try:
        fmt = formats.from_marker(marker)
    except ValueError:
        return False
    if fmt.pad_multiple > 1 and layer.order not in (None, SWIZZLED):
        return False
    empty = {p: torch.empty(i.shape, dtype=i.dtype, device="meta") for p, i in layer.parts.items()}
    try:
        fmt.unpack(empty, torch.float32, None, marker)
    except (ValueError, TypeError, RuntimeError):
        return False
    return True


def _is_plain_fp8(layer: RawLayer) -> bool:
    """Return whether a layer is FP8 with a float scale, which needs no marking to be read."""
    scale = layer.parts.get("weight_scale")
    plain = scale is not None and scale.dtype.is_floating_point and scale.dtype.itemsize > 1
    return plain and layer.parts["weight"].dtype in FP8


def _has_scales(layer: RawLayer) -> bool:
    return any("scale" in part or part == "alpha" for part in layer.parts)


def _ambiguous(path: str, layer: RawLayer, ways: list[tuple[Reading, str | None]]) -> str:
    orders = [f"--scales {SOURCE_WORDS[o]}" for o in dict.fromkeys(o for _, o in ways) if o]
    asked = f" {orders[0]}" if len(orders) == 1 else ""
    names = list(dict.fromkeys(reading.dialect for reading, _ in ways))
    if layer.marker and _is_out_of_order(layer):
        # What is marked, in another order, comes before another program's order of nibbles.
        names.sort(key=lambda name: name not in formats.names())
    options = " or ".join(f"`--from {name}{asked}`" for name in names)
    if len(orders) > 1:
        options += f", and {' or '.join(f'`{order}`' for order in orders)}"
    if layer.marker and _is_out_of_order(layer):
        options += f", or `--scales {SOURCE_WORDS[SWIZZLED]}` if the marking is right"
    marking = f"marked {layer.marker.get('format')}, but " if layer.marker else ""
    order = f" {layer.order}," if layer.order else ""
    whole = f"`lowbit convert {shlex.quote(path)} DST` with {options}"
    if layer.across == BOTH:
        return (
            f"{path}: layer {layer.name}: {marking}{_words(layer)}, does not show whether each "
            f"scale is of a row or of a column. If of a row, say it: {whole}; else {AGAIN}"
        )
    return (
        f"{path}: layer {layer.name}: {marking}{_words(layer)},{order} does not show who wrote it. "
        f"Say it: {whole}"
    )


def _words(layer: RawLayer) -> str:
    def one(part: str) -> str:
        info = layer.parts[part]
        return f"{part} {str(info.dtype).removeprefix('torch.')} {list(info.shape)}"

    return ", ".join(map(one, _telling(layer)))


def _telling(layer: RawLayer) -> Iterator[str]:
    yield "weight"
    yield from sorted(p for p in layer.parts if "scale" in p or p == "alpha")
