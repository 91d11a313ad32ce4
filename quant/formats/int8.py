"""INT8, one scale per output channel: the host's `int8_tensorwise` with a scale [N, 1]."""

import torch

from ._int8 import INT8Layout
from .base import Format, register_layout


@register_layout
class LowBitINT8Layout(INT8Layout):
    """INT8 payload, not rotated; the activation is quantized per token."""

    scheme = "int8_row"


FORMAT = Format(
    name="int8",
    title="INT8, one scale per output channel",
    storage=torch.int8,
    bits=8,
    max=torch.iinfo(torch.int8).max,
    group=None,
    max_error=0.012,
    layout=LowBitINT8Layout,
    marker={"format": "int8_tensorwise"},
    scales={"scale": "weight_scale"},
    quantize_kwargs={"per_channel": True},
)
