"""MXFP8: E4M3 elements, one E8M0 (power of two) scale per 32 along K, scales swizzled."""

import torch

from ...ops import block_scales
from ...ops.rounding import round_stochastic
from ._mx import GROUP, MXLayout
from .base import Format, register_layout


@register_layout
class LowBitMXFP8Layout(MXLayout):
    """E4M3 payload [N, K], swizzled E8M0 block scales; pads N and K to 32."""

    scheme = "mxfp8"
    top = torch.finfo(torch.float8_e4m3fn).max

    @classmethod
    def nearest(cls, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block_scales.mxfp8(values)

    @classmethod
    def stochastic(cls, values: torch.Tensor, seed: int) -> torch.Tensor:
        return round_stochastic(values, torch.float8_e4m3fn, seed).to(torch.float8_e4m3fn)


FORMAT = Format(
    name="mxfp8",
    title="MXFP8: FP8 E4M3, one power-of-two scale per 32",
    storage=torch.float8_e4m3fn,
    bits=8.25,
    max=torch.finfo(torch.float8_e4m3fn).max,
    group=GROUP,
    max_error=0.03,
    layout=LowBitMXFP8Layout,
    marker={"format": "mxfp8"},
    scales={"scale": "weight_scale"},
    scale_dtypes={"weight_scale": torch.float8_e8m0fnu},
    pad_multiple=GROUP,
)
