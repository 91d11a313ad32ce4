"""What the FP8 formats share: a layout with one scale per tensor or one per output channel."""

from collections.abc import Mapping
from typing import Any

import comfy_kitchen
import torch
from comfy_kitchen.tensor import TensorCoreFP8Layout, register_layout_op
from comfy_kitchen.tensor.base import dequantize_args

from ...ops.current_gpu import on_gpu_of
from ...ops.quantize_rows import LIMITS, quantize_rows
from ...ops.rounding import SMALLEST_SCALE, round_stochastic
from .base import LowBitLayout


class FP8Layout(LowBitLayout, TensorCoreFP8Layout):
    """FP8 payload and float32 scale: real = stored · scale, dequantized in float32."""

    dtype: torch.dtype = torch.float8_e4m3fn
    kitchen_layout = "TensorCoreFP8Layout"

    @classmethod
    def absmax_scale(cls, tensor: torch.Tensor) -> torch.Tensor:
        """Return the scale that maps the largest magnitude to the format's largest value."""
        return (tensor.abs().amax().float() / torch.finfo(cls.dtype).max).clamp_min(SMALLEST_SCALE)

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
        """Return tensor / scale rounded to nearest, in float32.

        An activation [M, K] of 16 bits, which the host quantizes with a file's static scale, takes
        our kernel, which reads it as it is; the rest comfy-kitchen's.
        """
        if tensor.is_cuda and tensor.dtype.itemsize == 2 and cls.dtype in LIMITS:
            flat = tensor.reshape(-1, tensor.shape[-1])
            return quantize_rows(flat, cls.dtype, input_scale=scale)[0].reshape(tensor.shape)
        value = tensor.float()
        # Cut off at the format's largest value, Inf would pass for a number.
        value = torch.where(value.isinf(), torch.nan, value)
        with on_gpu_of(value):
            return comfy_kitchen.quantize_per_tensor_fp8(value, scale, cls.dtype)

    @classmethod
    def dequantize(cls, qdata, params):
        """Return stored · scale, multiplied in float32 and rounded once to the logical dtype."""
        return (qdata.float() * params.scale).to(params.orig_dtype)

    @classmethod
    def whole_tensor(cls, weight: torch.Tensor, largest: torch.Tensor) -> dict[str, Any]:
        return {"scale": (largest / torch.finfo(cls.dtype).max).clamp_min(SMALLEST_SCALE)}

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        scale = values["scale"]
        if scale.numel() == 1:
            return None
        return (
            f"weight_scale has shape {tuple(scale.shape)}, one scale per tensor is wanted; "
            "scales per output channel are format fp8_e4m3_rowwise"
        )


def _dequantized(func):
    def run(qt, args, kwargs):
        return func(*dequantize_args(args), **kwargs)

    return run


# comfy-kitchen's own handlers keep the payload and multiply it by the scale in the logical dtype:
# float16 has few digits of a scale below 6e-5. A scale per row would not move along either.
for _func in (
    torch.ops.aten.t.default,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
):
    register_layout_op(_func, FP8Layout)(_dequantized(_func))
