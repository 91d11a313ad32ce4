"""Layers in the host's own words whose marking is lost, or whose scales lie in another order.

`--from` takes the format's name.
"""

from functools import partial

import torch

from .. import formats
from ..checkpoint.header import TensorInfo
from ..formats import Format
from ..scale_order import SWIZZLED
from .base import BYTES, COLUMNS_OF_WEIGHT, RawLayer, Reading, Tensors, block_parts, optional

NAMES = formats.names()
INPUT = ("input_scale", "pre_quant_scale")


def read(layer: RawLayer) -> list[Reading]:
    """Return a reading for each format that the tensors would fit."""
    return [r for r in (_reading(formats.get(name), layer) for name in NAMES) if r]


def _reading(fmt: Format, layer: RawLayer) -> Reading | None:
    wanted = {"weight", *(p for p in fmt.scales.values() if p not in fmt.optional)}
    foreign = {p for p in layer.parts if "scale" in p} - {*fmt.scales.values(), *INPUT}
    if layer.across == COLUMNS_OF_WEIGHT or (layer.marker and not _is_marked(layer, fmt)):
        return None
    weight = layer.parts["weight"]
    payloads = BYTES if fmt.storage in BYTES else {fmt.storage}
    # Plain bytes are what a marking says.
    payloads = payloads | {torch.uint8} if layer.marker else payloads
    if not layer.has(*wanted) or foreign or weight.dtype not in payloads:
        return None
    order = layer.order or SWIZZLED
    if fmt.pad_multiple > 1:
        if order not in layer.orders():
            return None
    elif any(_is_wrong(fmt, part, layer.parts) for part in fmt.scales.values()):
        return None
    n, k = weight.shape
    empty = {p: torch.empty(i.shape, dtype=i.dtype, device="meta") for p, i in layer.parts.items()}
    convert = partial(_convert, fmt, order)
    try:
        fmt.unpack(convert(empty), torch.float32, None, fmt.marker)
    except (ValueError, TypeError, RuntimeError):
        return None
    # A float32 scale and integers are what half a dozen programs write, rotated or not; an order
    # other than the host's is somebody's mistake.
    certain = (fmt.storage not in BYTES or len(fmt.scales) > 1) and order == SWIZZLED
    return Reading(fmt.name, fmt, (n, k * fmt.packed), convert, certain)


def _is_marked(layer: RawLayer, fmt: Format) -> bool:
    try:
        return formats.from_marker(layer.marker) is fmt
    except ValueError:
        return False


def _is_wrong(fmt: Format, part: str, parts: dict[str, TensorInfo]) -> bool:
    """Return whether a scale is a float where bytes are wanted, or the other way round."""
    wanted = fmt.scale_dtypes.get(part, torch.float32)
    return part in parts and (parts[part].dtype.itemsize == 1) != (wanted.itemsize == 1)


def _convert(fmt: Format, order: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    parts = optional(tensors, "weight", *fmt.scales.values(), *INPUT)
    if fmt.pad_multiple > 1:
        return parts | block_parts(fmt, parts["weight"], parts["weight_scale"], order)
    if fmt.storage == torch.int8 and fmt.packed == 1:
        # One scale per row; some writers leave the second dimension out.
        rows = parts["weight_scale"].numel() == parts["weight"].shape[0]
        parts["weight_scale"] = parts["weight_scale"].reshape((-1, 1) if rows else ())
    return parts
