"""FP8 E4M3, one scale per tensor: the host's `float8_e4m3fn`."""

import torch

from ._fp8 import FP8Layout
from .base import Format, register_layout


@register_layout
class LowBitFP8E4M3Layout(FP8Layout):
    """E4M3 payload, scalar scale."""

    scheme = "fp8_tensor"


FORMAT = Format(
    name="fp8_e4m3",
    title="FP8 E4M3, one scale per tensor",
    storage=torch.float8_e4m3fn,
    bits=8,
    max=torch.finfo(torch.float8_e4m3fn).max,
    group=None,
    max_error=0.03,
    layout=LowBitFP8E4M3Layout,
    marker={"format": "float8_e4m3fn"},
    scales={"scale": "weight_scale"},
)
