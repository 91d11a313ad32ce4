"""What the FP8 formats share: a layout with one scale per tensor or one per output channel."""

from collections.abc import Mapping

import comfy_kitchen
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout, register_layout_op

from ...ops.rounding import round_stochastic
from .base import LowBitLayout

# The smallest scale: a tensor or row of zeros keeps it, so that no scale is ever zero.
TINY = torch.finfo(torch.float32).tiny


class FP8Layout(LowBitLayout, TensorCoreFP8Layout):
    """FP8 payload and float32 scale: real = stored · scale, dequantized in float32."""

    dtype: torch.dtype = torch.float8_e4m3fn
    kitchen_layout = "TensorCoreFP8Layout"

    @classmethod
    def absmax_scale(cls, tensor: torch.Tensor) -> torch.Tensor:
        """Return the scale that maps the largest magnitude to the format's largest value."""
        return (tensor.abs().amax().float() / torch.finfo(cls.dtype).max).clamp_min(TINY)

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, **kwargs):
        """Return (stored, Params). scale: as `absmax_scale` gives it; None or "recalculate": that.

        tensor: [N, K] float. stochastic_rounding: a seed, 0 or None to round to nearest.
        """
        if scale is None or isinstance(scale, str):
            scale = cls.absmax_scale(tensor)
        scale = scale.to(device=tensor.device, dtype=torch.float32)
        if stochastic_rounding:
            stored = round_stochastic(tensor.float() / scale, cls.dtype, stochastic_rounding)
            stored = stored.to(cls.dtype)
        else:
            stored = cls.round_nearest(tensor, scale)
        params = cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))
        return stored, params

    @classmethod
    def round_nearest(cls, tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return tensor / scale rounded to nearest, by comfy-kitchen's kernel, in float32."""
        return comfy_kitchen.quantize_per_tensor_fp8(tensor.float(), scale, cls.dtype)

    @classmethod
    def dequantize(cls, qdata, params):
        """Return stored · scale, multiplied in float32 and rounded once to the logical dtype."""
        return (qdata.float() * params.scale).to(params.orig_dtype)

    @classmethod
    def tensor_scale(cls, largest: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scale": (largest / torch.finfo(cls.dtype).max).clamp_min(TINY)}

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        scale = values["scale"]
        if scale.numel() == 1:
            return None
        return (
            f"weight_scale has shape {tuple(scale.shape)}, one scale per tensor is wanted; "
            "scales per output channel are format fp8_e4m3_rowwise"
        )


def dequantize_shape_ops(layout: type) -> None:
    """Route shape operations on `layout` through dequantization: its scales do not move along."""

    def handler(func):
        def run(qt, args, kwargs):
            plain = [a.dequantize() if isinstance(a, QuantizedTensor) else a for a in args]
            return func(*plain, **kwargs)

        return run

    aten = torch.ops.aten
    for func in (aten.t.default, aten.view.default, aten.reshape.default):
        register_layout_op(func, layout)(handler(func))
