"""INT4 codes with a codebook, rotated, one E4M3 scale per 16: the host's `asym_w4a8_int8`.

Activations are quantized to INT8. The codebook (16 float32 values) is one for the whole weight, and
comfy-kitchen's quantizer chooses it from rows spread evenly over the weight.
"""

from collections.abc import Mapping
from typing import Any

import torch
from comfy_kitchen.tensor import AsymW4A8Int8Layout

from .base import Format, LowBitLayout, register_layout
from .int8_convrot import ROTATION

GROUP = 16
# Elements of the rows from which comfy-kitchen chooses the codebook.
SAMPLE_ELEMENTS = 1 << 22


@register_layout
class LowBitAsymW4A8Layout(LowBitLayout, AsymW4A8Int8Layout):
    """Packed 4-bit codes [N, K/2], scale [N, K/16], channel scale [N], codebook [16] or none."""

    scheme = "asym_w4a8_int8"
    shared = frozenset({"codebook"})
    kitchen_layout = "AsymW4A8Int8Layout"

    @classmethod
    def whole_tensor(cls, weight: torch.Tensor, largest: torch.Tensor) -> dict[str, Any]:
        n, k = weight.shape
        rows = min(max(SAMPLE_ELEMENTS // k, 1), n)
        index = torch.linspace(0, n - 1, rows, device=weight.device).long()
        sample = weight if rows == n else weight.index_select(0, index)
        return {"codebook_tensor": cls.quantize(sample.float().contiguous())[1].codebook}

    @classmethod
    def options(cls, marker: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "group_size": int(marker.get("group_size", GROUP)),
            "convrot_groupsize": int(marker.get("convrot_groupsize", ROTATION)),
        }

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        # `Params` checks the rest: the group is the marker's.
        for param in ("scale", "s_channel"):
            got = tuple(values[param].shape)
            if got[:1] != shape[:1]:
                return f"{FORMAT.scales[param]} has shape {got}, {shape[0]} rows are wanted"
        return None


FORMAT = Format(
    name="asym_w4a8_int8",
    title="INT4 codebook, rotated, one E4M3 scale per 16, 8-bit activations",
    storage=torch.int8,
    bits=4.5,
    max=7,
    group=GROUP,
    max_error=0.085,
    layout=LowBitAsymW4A8Layout,
    marker={"format": "asym_w4a8_int8", "group_size": GROUP, "convrot_groupsize": ROTATION},
    scales={
        "scale": "weight_s_rel",
        "s_channel": "weight_s_channel",
        "codebook": "weight_codebook",
        "correction": "weight_correction",
    },
    optional=frozenset({"weight_codebook", "weight_correction"}),
    scale_dtypes={"weight_s_rel": torch.float8_e4m3fn},
    k_multiple=ROTATION,
    packed=2,
)
