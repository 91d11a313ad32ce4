"""What the MX formats share: a layout with one E8M0 (power of two) scale per 32 along K.

Source: OCP Microscaling Formats (MX) v1.0; scales are swizzled as cuBLAS wants them.
"""

from collections.abc import Mapping

import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked
from comfy_kitchen.tensor import TensorCoreMXFP8Layout

from ...ops.block_scales import e8m0_to_float, e8m0_without_cutting
from ._blocks import misfit, mixed
from .base import LowBitLayout

GROUP = 32


class MXLayout(LowBitLayout, TensorCoreMXFP8Layout):
    """A payload and swizzled E8M0 block scales; pads N and K to 32.

    `top`: the largest magnitude of an element; `nearest` and `stochastic` are its arithmetic.
    """

    kitchen_layout = "TensorCoreMXFP8Layout"
    mixed = staticmethod(mixed)
    top: float

    @classmethod
    def nearest(cls, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (stored, block scales [N, K/32]), the scales chosen by their error."""
        raise NotImplementedError

    @classmethod
    def stochastic(cls, values: torch.Tensor, seed: int) -> torch.Tensor:
        """Return scaled values [N, K], none above `top`, rounded stochastically, as stored."""
        raise NotImplementedError

    @classmethod
    def quantize(cls, tensor, stochastic_rounding=0, **kwargs):
        """Return (stored, Params); the scale of a block follows from the block.

        stochastic_rounding: a seed, 0 or None to round to nearest. With a seed the scale is the
        least by which nothing is cut off: no rounding makes up for that on average.
        """
        shape = tuple(tensor.shape)
        n, k = cls.get_padded_shape(shape)
        values = torch.nn.functional.pad(tensor.float(), (0, k - shape[1], 0, n - shape[0]))
        if stochastic_rounding:
            largest = values.view(n, k // GROUP, GROUP).abs().amax(dim=-1)
            scale = e8m0_without_cutting(largest, cls.top)
            step = e8m0_to_float(scale).repeat_interleave(GROUP, dim=1)
            stored = cls.stochastic(values / step, stochastic_rounding)
        else:
            stored, scale = cls.nearest(values)
        scale = to_blocked(scale.view(torch.uint8), flatten=False).view(torch.float8_e8m0fnu)
        return stored, cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=shape)

    @classmethod
    def unswizzled(cls, scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """Return the scales of a padded weight [N, K] as float32 [N, K/32]."""
        codes = from_blocked(scale.view(torch.uint8), num_rows=n, num_cols=k // GROUP)
        return e8m0_to_float(codes.contiguous())

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
