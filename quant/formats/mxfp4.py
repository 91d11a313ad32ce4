"""MXFP4: E2M1 elements, one E8M0 (power of two) scale per 32 along K; ours, the host has none.

On disk two elements share a byte, the even column in the high nibble as in NVFP4; block scales are
swizzled as MXFP8's. Source: OCP Microscaling Formats (MX) v1.0.
"""

import torch

from ...ops import block_scales
from ...ops.rounding import GRIDS, round_stochastic
from ._mx import GROUP, MXLayout
from .base import Format, register_layout


@register_layout
class LowBitMXFP4Layout(MXLayout):
    """Packed E2M1 payload [N, K/2], swizzled E8M0 block scales; pads N and K to 32."""

    scheme = "mxfp4"
    top = GRIDS["e2m1"][2]

    @classmethod
    def nearest(cls, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block_scales.mxfp4(values)

    @classmethod
    def stochastic(cls, values: torch.Tensor, seed: int) -> torch.Tensor:
        return block_scales.pack_e2m1(round_stochastic(values, "e2m1", seed))

    @classmethod
    def dequantize(cls, qdata, params):
        """Return the values, exact in float32, rounded once to the logical dtype."""
        values = block_scales.unpack_e2m1(qdata)
        n, k = values.shape
        scale = cls.unswizzled(params.scale, n, k)
        values.view(n, k // GROUP, GROUP).mul_(scale.unsqueeze(-1))
        return values.to(params.orig_dtype)

    @classmethod
    def get_storage_shape(cls, orig_shape: tuple[int, ...]) -> tuple[int, ...]:
        n, k = cls.get_padded_shape(orig_shape)
        return (n, k // 2)

    @classmethod
    def get_logical_shape_from_storage(cls, storage_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (storage_shape[0], storage_shape[1] * 2)


FORMAT = Format(
    name="mxfp4",
    title="MXFP4: FP4 E2M1, one power-of-two scale per 32",
    storage=torch.uint8,
    bits=4.25,
    max=GRIDS["e2m1"][2],
    group=GROUP,
    max_error=0.125,
    layout=LowBitMXFP4Layout,
    marker={"format": "mxfp4"},
    scales={"scale": "weight_scale"},
    native=False,
    stand_in="mxfp8",
    scale_dtypes={"weight_scale": torch.float8_e8m0fnu},
    pad_multiple=GROUP,
    packed=2,
)
