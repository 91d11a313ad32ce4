"""MXFP8: E4M3 elements, one E8M0 (power of two) scale per 32 along K, scales swizzled."""

from collections.abc import Mapping

import comfy_kitchen
import torch
from comfy_kitchen.float_utils import e8m0_to_f32, from_blocked
from comfy_kitchen.tensor import TensorCoreMXFP8Layout

from ...ops.kitchen import kitchen_eager
from ...ops.rounding import round_stochastic
from ._blocks import misfit
from .base import Format, LowBitLayout, register_layout

GROUP = 32


@register_layout
class LowBitMXFP8Layout(LowBitLayout, TensorCoreMXFP8Layout):
    """E4M3 payload [N, K], swizzled E8M0 block scales; pads N and K to 32."""

    scheme = "mxfp8"
    kitchen_layout = "TensorCoreMXFP8Layout"

    @classmethod
    def quantize(cls, tensor, stochastic_rounding=0, **kwargs):
        """Return (stored, Params); the scale of a block follows from the block."""
        shape = tuple(tensor.shape)
        n, k = cls.get_padded_shape(shape)
        values = torch.nn.functional.pad(tensor.float(), (0, k - shape[1], 0, n - shape[0]))
        with kitchen_eager():
            stored, scale = comfy_kitchen.quantize_mxfp8(values)
        if stochastic_rounding:
            exponents = from_blocked(scale.view(torch.uint8), num_rows=n, num_cols=k // GROUP)
            step = e8m0_to_f32(exponents).repeat_interleave(GROUP, dim=1)
            stored = round_stochastic(values / step, torch.float8_e4m3fn, stochastic_rounding)
            stored = stored.to(torch.float8_e4m3fn)
        return stored, cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=shape)

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        """Return suffix → tensor on disk, the scales as plain bytes.

        ComfyUI's reader for its dynamic memory management does not know the E8M0 dtype; its loader
        takes bytes for it.
        """
        return {"": qdata, "_scale": params.scale.view(torch.uint8)}

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        return misfit(shape, values["scale"], GROUP)


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
