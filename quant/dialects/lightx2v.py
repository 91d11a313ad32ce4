"""LightX2V's NVFP4: scales swizzled, even column in the low nibble, tensor scales as reciprocals.

Its MXFP8 is the host's without a marking, so that it has to be asked for.

Calibrated files have `alpha` = 1 / (input_global_scale · weight_global_scale) and
`input_global_scale`; before that there are `weight_global_scale` and perhaps `input_absmax`. A
global scale is 2688 / absmax, 2688 = 6 · 448.
Source: LightX2V `tools/convert/quant/quant.py`, `tools/convert/add_scale_to_models.py`.
"""

from functools import partial

import torch

from .. import formats
from ..formats import Format
from ..scale_order import SWIZZLED
from .base import RawLayer, Reading, Tensors, block_parts, check_single, optional

NAMES = ("lightx2v",)
GLOBAL_RANGE = 6 * torch.finfo(torch.float8_e4m3fn).max
CALIBRATED = ("alpha", "input_global_scale")
UNCALIBRATED = "weight_global_scale"
ABSMAX = "input_absmax"


def read(layer: RawLayer) -> list[Reading]:
    """Return how the layer is read if its tensors bear LightX2V's names.

    Raises CheckpointError that names the layer where a tensor scale is not one value.
    """
    if SWIZZLED not in layer.orders():
        return []
    if not layer.is_packed:
        fmt = formats.get("mxfp8")
        convert = partial(_convert_mxfp8, fmt)
        return [Reading(NAMES[0], fmt, layer.shape, convert, certain=False)]
    if not layer.has(*CALIBRATED) and not layer.has(UNCALIBRATED):
        return []
    check_single(layer, "LightX2V", *CALIBRATED, UNCALIBRATED, ABSMAX)
    return [Reading(NAMES[0], formats.get("nvfp4"), layer.shape, _convert)]


def _convert_mxfp8(fmt: Format, tensors: Tensors) -> dict[str, torch.Tensor]:
    parts = block_parts(fmt, tensors["weight"], tensors["weight_scale"], SWIZZLED)
    return parts | optional(tensors, "pre_quant_scale")


def _convert(tensors: Tensors) -> dict[str, torch.Tensor]:
    fmt = formats.get("nvfp4")
    parts = block_parts(fmt, tensors["weight"], tensors["weight_scale"], SWIZZLED, low_first=True)
    if UNCALIBRATED in tensors:
        scale = 1 / tensors[UNCALIBRATED].double()
        absmax = tensors.get(ABSMAX)
        input_scale = None if absmax is None else absmax.double() / GLOBAL_RANGE
    else:
        alpha, global_scale = (tensors[part].double() for part in CALIBRATED)
        scale, input_scale = alpha * global_scale, 1 / global_scale
    parts["weight_scale_2"] = scale.float().reshape(())
    if input_scale is not None:
        parts["input_scale"] = input_scale.float().reshape(())
    return parts | optional(tensors, "pre_quant_scale")
