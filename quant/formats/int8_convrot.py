"""INT8 after a 256-wide Hadamard rotation along K: the host's `int8_tensorwise` with `convrot`.

The rotation spreads outliers over 256 columns; the activation is rotated alike when the layer runs,
so that the product is unchanged. Source: comfy-kitchen's ConvRot (regular Hadamard, powers of 4).
"""

from collections.abc import Mapping
from typing import Any

import torch

from ._int8 import INT8Layout
from .base import Format, register_layout

ROTATION = 256


@register_layout
class LowBitINT8ConvRotLayout(INT8Layout):
    """INT8 payload of the rotated weight; the activation is rotated and quantized per token."""

    scheme = "int8_row_convrot"

    @classmethod
    def options(cls, marker: Mapping[str, Any]) -> dict[str, Any]:
        width = marker.get("convrot_groupsize", ROTATION)
        return {"convrot": True, "convrot_groupsize": int(width)}


FORMAT = Format(
    name="int8_convrot",
    title="INT8 after a 256-wide Hadamard rotation",
    storage=torch.int8,
    bits=8,
    max=torch.iinfo(torch.int8).max,
    group=None,
    max_error=0.011,
    layout=LowBitINT8ConvRotLayout,
    marker={"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": ROTATION},
    scales={"scale": "weight_scale"},
    k_multiple=ROTATION,
    quantize_kwargs={"per_channel": True, "convrot": True, "convrot_groupsize": ROTATION},
)
