"""What convert_to_quant writes beyond the host's formats, and scales that are not what is marked.

`hybrid_mxfp8` is MXFP8 with one more scale; `…_rowwise`, and one scale per row under a marking for
one per tensor, is our rowwise FP8; scales of tiles, of groups of columns, or of rows of E5M2 have
no counterpart.
Source: convert_to_quant `comfy/quant_ops.py`, `formats/hybrid_mxfp8_conversion.py`.
"""

from functools import partial

import torch

from .. import formats
from ..checkpoint.header import TensorInfo
from ..formats import Format, flat_marker
from ..scale_order import SWIZZLED
from .base import (
    BLOCKWISE,
    BOTH,
    ROWS_OF_WEIGHT,
    RawLayer,
    Reading,
    Tensors,
    block_parts,
    optional,
)

NAMES = ("convert_to_quant",)
FLOATS = {torch.float32, torch.float16, torch.bfloat16}
# With what the names of formats begin that have such a payload.
PAYLOADS = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}
INPUT = ("input_scale", "pre_quant_scale")
# The one marking of rows in INT8; without it they may be rotated, or not.
INT8_MARKER = "int8_tensorwise"


def read(layer: RawLayer) -> list[Reading]:
    """Return how the layer is read if its scales are of rows, of groups or of tiles."""
    weight, scale = layer.parts["weight"], layer.parts.get("weight_scale")
    if scale is None:
        return []
    if layer.marker.get("format") == "hybrid_mxfp8":
        order = layer.order or SWIZZLED
        fits = weight.dtype == torch.float8_e4m3fn and order in layer.orders()
        fmt = formats.get("mxfp8")
        return [_reading(layer, fmt, partial(_blocks, fmt, order))] if fits else []
    payload = PAYLOADS.get(weight.dtype)
    marked = str(layer.marker.get("format", payload))
    if payload is None or scale.dtype not in FLOATS or not marked.startswith(payload):
        return []
    n, _ = weight.shape
    blockwise = marked.endswith(BLOCKWISE)
    across = layer.across
    # [1, N] is a scale for each row too, unless the marking says tiles or other layers columns.
    if across in (ROWS_OF_WEIGHT, BOTH) or (n > 1 and scale.shape in ((n,), (n, 1), (n, 1, 1))):
        if weight.dtype == torch.float8_e5m2:
            return [_reading(layer, None, _values_of_rows, certain=across != BOTH)]
        fmt = _row_format(layer, weight, scale)
        return [_reading(layer, fmt, _rows, certain=across != BOTH)] if fmt else []
    unknown = weight.dtype == torch.int8 and not layer.marker
    rotated = flat_marker(layer.marker).get("convrot")
    if unknown or rotated or not _is_grouped(weight, scale, blockwise):
        return []
    return [_reading(layer, None, _values)]


def _reading(layer: RawLayer, fmt: Format | None, convert, certain: bool = True) -> Reading:
    return Reading(NAMES[0], fmt, tuple(layer.parts["weight"].shape), convert, certain)


def _row_format(layer: RawLayer, weight: TensorInfo, scale: TensorInfo) -> Format | None:
    """Return the format with one scale per row, of which the shape or the marking is wrong."""
    if weight.dtype == torch.float8_e4m3fn:
        return formats.get("fp8_e4m3_rowwise")
    is_int8 = weight.dtype == torch.int8 and layer.marker.get("format") == INT8_MARKER
    if is_int8 and scale.shape != (scale.shape[0], 1):
        return formats.from_marker(layer.marker)
    return None


def _is_grouped(weight: TensorInfo, scale: TensorInfo, blockwise: bool) -> bool:
    """Return whether each scale is of a tile of the weight, of the same size for all.

    Unless the marking says tiles they have to be square, of one row each, or one for the whole:
    nobody writes others, and that a shape divides the weight's proves nothing.
    """
    shape = scale.shape[:-1] if len(scale.shape) == 3 and scale.shape[-1] == 1 else scale.shape
    if len(shape) != 2 or 0 in shape:
        return False
    if any(size % count for size, count in zip(weight.shape, shape, strict=True)):
        return False
    height, width = (size // count for size, count in zip(weight.shape, shape, strict=True))
    return blockwise or height in (1, width) or shape == (1, 1)


def _rows(tensors: Tensors) -> dict[str, torch.Tensor]:
    scale = tensors["weight_scale"].float().reshape(-1, 1)
    return {"weight": tensors["weight"], "weight_scale": scale} | optional(tensors, *INPUT)


def _blocks(fmt: Format, order: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    parts = block_parts(fmt, tensors["weight"], tensors["weight_scale"], order)
    return parts | optional(tensors, *INPUT)


def _values_of_rows(tensors: Tensors) -> dict[str, torch.Tensor]:
    return _values({**tensors, "weight_scale": tensors["weight_scale"].reshape(-1, 1)})


def _values(tensors: Tensors) -> dict[str, torch.Tensor]:
    weight = tensors["weight"].float()
    n, k = weight.shape
    scale = tensors["weight_scale"].float()
    scale = scale.reshape(scale.shape[:2])
    tiles = weight.reshape(scale.shape[0], n // scale.shape[0], scale.shape[1], -1)
    values = tiles.mul_(scale[:, None, :, None]).reshape(n, k)
    return {"weight": values} | optional(tensors, "pre_quant_scale")
