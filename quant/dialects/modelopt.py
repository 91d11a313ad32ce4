"""NVIDIA ModelOpt's block-scaled layers, which diffusers writes too.

Scales are flat and the even column is in the low nibble. `input_scale` is amax / 2688 as the
host's. Source: Model-Optimizer, `modelopt/torch/quantization/qtensor/nvfp4_tensor.py`.
"""

from functools import partial

import torch

from .. import formats
from ..formats import Format
from ..scale_order import FLAT
from .base import RawLayer, Reading, Tensors, block_parts, check_single, optional

NAMES = ("modelopt",)
SINGLE = ("weight_scale_2", "input_scale")


def read(layer: RawLayer) -> list[Reading]:
    """Return how the layer is read if its scales may be flat; a marking would speak against it.

    Raises CheckpointError that names the layer where a tensor scale is not one value.
    """
    if FLAT not in layer.orders() or layer.is_packed != layer.has("weight_scale_2"):
        return []
    fmt = formats.get("nvfp4" if layer.is_packed else "mxfp8")
    if layer.shape[1] % fmt.group:
        return []
    check_single(layer, "ModelOpt", *SINGLE)
    return [Reading(NAMES[0], fmt, layer.shape, partial(_convert, fmt), not layer.marker)]


def _convert(fmt: Format, tensors: Tensors) -> dict[str, torch.Tensor]:
    parts = block_parts(
        fmt, tensors["weight"], tensors["weight_scale"], FLAT, low_first=fmt.packed > 1
    )
    return parts | optional(tensors, *SINGLE, "pre_quant_scale")
