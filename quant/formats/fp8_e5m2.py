"""FP8 E5M2, one scale per tensor: the host's `float8_e5m2`."""

import torch

from ._fp8 import FP8Layout
from .base import Format, register_layout


@register_layout
class LowBitFP8E5M2Layout(FP8Layout):
    """E5M2 payload, scalar scale."""

    scheme = "fp8_tensor"
    dtype = torch.float8_e5m2


FORMAT = Format(
    name="fp8_e5m2",
    title="FP8 E5M2, one scale per tensor",
    storage=torch.float8_e5m2,
    bits=8,
    max=torch.finfo(torch.float8_e5m2).max,
    group=None,
    max_error=0.06,
    layout=LowBitFP8E5M2Layout,
    marker={"format": "float8_e5m2"},
    scales={"scale": "weight_scale"},
)
