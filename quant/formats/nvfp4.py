"""NVFP4: E2M1 elements, one E4M3 scale per 16 along K, one float32 scale per tensor.

On disk two elements share a byte, the even column in the high nibble; block scales, chosen by their
error, are swizzled.
"""

from collections.abc import Mapping
from typing import Any

import torch
from comfy_kitchen.float_utils import from_blocked

from ...ops.block_scales import pack_e2m1
from ...ops.linear.nvfp4 import E2M1_MAX, NVFP4Layout
from ...ops.rounding import round_stochastic
from ._blocks import misfit, mixed
from .base import Format, LowBitLayout, register_layout

GROUP = 16


@register_layout
class LowBitNVFP4Layout(LowBitLayout, NVFP4Layout):
    """Packed E2M1 payload [N, K/2], scalar scale, swizzled block scales; pads N and K to 16."""

    mixed = staticmethod(mixed)

    @classmethod
    def whole_tensor(cls, weight: torch.Tensor, largest: torch.Tensor) -> dict[str, Any]:
        return {"scale": cls.tensor_scale(largest)}

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, **kwargs):
        """Return (packed, Params). scale: of the tensor, float32; None or "recalculate": absmax.

        Stochastic rounding keeps comfy-kitchen's block scales: one chosen by error may cut values
        off further, which no rounding makes up for on average.
        """
        if scale is None or isinstance(scale, str):
            scale = cls.whole_tensor(tensor, tensor.abs().amax().float())["scale"]
        scale = scale.to(device=tensor.device, dtype=torch.float32)
        if stochastic_rounding:
            block_scale = cls.absmax_scales(tensor, scale)
            values = cls.padded(tensor)
            n, k = values.shape
            step = from_blocked(block_scale, num_rows=n, num_cols=k // GROUP).float() * scale
            step = torch.where(step == 0, torch.inf, step).repeat_interleave(GROUP, dim=1)
            packed = pack_e2m1(round_stochastic(values / step, "e2m1", stochastic_rounding))
        else:
            packed, block_scale = cls.pack(tensor, scale)
        params = cls.Params(
            scale=scale,
            orig_dtype=tensor.dtype,
            orig_shape=tuple(tensor.shape),
            block_scale=block_scale,
        )
        return packed, params

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        if values["scale"].numel() != 1:
            return f"weight_scale_2 has shape {tuple(values['scale'].shape)}, a scalar is wanted"
        return misfit(shape, values["block_scale"], GROUP)


FORMAT = Format(
    name="nvfp4",
    title="NVFP4: FP4 E2M1, one E4M3 scale per 16",
    storage=torch.uint8,
    bits=4.5,
    max=E2M1_MAX,
    group=GROUP,
    max_error=0.09,
    layout=LowBitNVFP4Layout,
    marker={"format": "nvfp4"},
    scales={"scale": "weight_scale_2", "block_scale": "weight_scale"},
    scale_dtypes={"weight_scale": torch.float8_e4m3fn},
    pad_multiple=GROUP,
    packed=2,
)
