"""INT4 after a 256-wide Hadamard rotation, activations in 4 bits too: the host's `convrot_w4a4`.

On disk two elements share a byte, the even column in the low nibble; one scale per output channel.
"""

from collections.abc import Mapping
from typing import Any

import torch
from comfy_kitchen.tensor import TensorCoreConvRotW4A4Layout

from .base import Format, LowBitLayout, register_layout
from .int8_convrot import ROTATION


@register_layout
class LowBitConvRotW4A4Layout(LowBitLayout, TensorCoreConvRotW4A4Layout):
    """Packed INT4 payload [N, K/2] of the rotated weight, float32 scale [N]."""

    scheme = "convrot_w4a4"
    kitchen_layout = "TensorCoreConvRotW4A4Layout"

    @classmethod
    def options(cls, marker: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "convrot_groupsize": int(marker.get("convrot_groupsize", ROTATION)),
            "linear_dtype": marker.get("linear_dtype", "int4"),
        }

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        scale = values["scale"]
        if tuple(scale.shape) == (shape[0],):
            return None
        return f"weight_scale has shape {tuple(scale.shape)}, [{shape[0]}] is wanted"


FORMAT = Format(
    name="convrot_w4a4",
    title="INT4 after a 256-wide Hadamard rotation, 4-bit activations",
    storage=torch.int8,
    bits=4,
    max=7,
    group=None,
    max_error=0.18,
    layout=LowBitConvRotW4A4Layout,
    marker={"format": "convrot_w4a4", "convrot_groupsize": ROTATION},
    scales={"scale": "weight_scale"},
    k_multiple=ROTATION,
    packed=2,
)
