"""FP8 E4M3, one scale per output channel: `float8_e4m3fn_rowwise`, which the host does not know."""

from collections.abc import Mapping
from typing import Any

import torch

from ...ops.rounding import SMALLEST_SCALE
from ._fp8 import FP8Layout
from .base import Format, register_layout


@register_layout
class LowBitFP8E4M3RowwiseLayout(FP8Layout):
    """E4M3 payload [N, K], float32 scale [N, 1]."""

    scheme = "fp8_row"

    @classmethod
    def absmax_scale(cls, tensor: torch.Tensor) -> torch.Tensor:
        largest = tensor.abs().amax(dim=1, keepdim=True).float()
        return (largest / torch.finfo(cls.dtype).max).clamp_min(SMALLEST_SCALE)

    @classmethod
    def round_nearest(cls, tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return tensor / scale rounded to nearest; comfy-kitchen has no kernel for this."""
        limit = torch.finfo(cls.dtype).max
        return (tensor.float() / scale).clamp(-limit, limit).to(cls.dtype)

    @classmethod
    def whole_tensor(cls, weight: torch.Tensor, largest: torch.Tensor) -> dict[str, Any]:
        return {}

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        scale = values["scale"]
        if tuple(scale.shape) == (shape[0], 1):
            return None
        return f"weight_scale has shape {tuple(scale.shape)}, [{shape[0]}, 1] is wanted"


FORMAT = Format(
    name="fp8_e4m3_rowwise",
    title="FP8 E4M3, one scale per output channel",
    storage=torch.float8_e4m3fn,
    bits=8,
    max=torch.finfo(torch.float8_e4m3fn).max,
    group=None,
    max_error=0.03,
    layout=LowBitFP8E4M3RowwiseLayout,
    marker={"format": "float8_e4m3fn_rowwise"},
    scales={"scale": "weight_scale"},
    native=False,
    stand_in="float8_e4m3fn",
)
