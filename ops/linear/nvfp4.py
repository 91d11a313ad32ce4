"""NVFP4 weights: E2M1 elements, one E4M3 scale per 16 along K, one float32 scale per tensor.

Two elements share a byte, the even column in the high nibble; block scales are swizzled as cuBLAS
wants them, in blocks of 128 rows; N and K are padded to multiples of 16.
"""

import comfy_kitchen
import torch
import torch.nn.functional as F
from comfy_kitchen.float_utils import to_blocked
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreNVFP4Layout, register_layout_class

from .. import block_scales
from ..current_gpu import on_gpu_of
from ..custom_op import custom_op
from ..kitchen import kitchen_eager
from ..rounding import GRIDS, SMALLEST_SCALE
from ..scaled_mm.check import OUTPUTS
from . import linear
from .arithmetic import arithmetic_of, with_arithmetic
from .fp8 import dtype_between

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
E2M1_MAX = GRIDS["e2m1"][2]
# Rows that are quantized at a time, a multiple of the 128 of a block of scales: pieces joined are
# the whole, byte for byte, without several float32 copies of it.
PIECE_ELEMENTS = 1 << 22
SCALE_BLOCK_ROWS = 128
# comfy-kitchen's CUDA kernel (0.2.31) dequantizes whole blocks of threads, four elements a thread,
# at most 1,024 threads, and asks nowhere where the weight ends: beyond that it writes to memory
# that is another's, such as the codes that are dequantized. Weights that fill them are safe.
KITCHEN_ELEMENTS = 4 * 1024


class NVFP4Layout(TensorCoreNVFP4Layout):
    """Packed E2M1 payload [N, K/2], scalar scale, swizzled block scales."""

    scheme = "nvfp4"
    kitchen_layout = "TensorCoreNVFP4Layout"

    @classmethod
    def tensor_scale(cls, largest: torch.Tensor) -> torch.Tensor:
        """Return the scale of a tensor from its largest magnitude: real = e2m1 · block · this."""
        return (largest.float() / (E4M3_MAX * E2M1_MAX)).clamp_min(SMALLEST_SCALE)

    @classmethod
    def pack(cls, values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (packed [N, K/2], swizzled block scales), the scales chosen by their error.

        values: [N, K] float; padded with zeros to multiples of 16. scale: of the whole tensor.
        """
        packed, blocks = block_scales.nvfp4(cls.padded(values), scale)
        return packed, to_blocked(blocks, flatten=False)

    @classmethod
    def absmax_scales(cls, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return comfy-kitchen's swizzled block scales: the largest value of a block is at 6."""
        with kitchen_eager():
            return comfy_kitchen.quantize_nvfp4(cls.padded(values), scale)[1]

    @classmethod
    def padded(cls, values: torch.Tensor) -> torch.Tensor:
        """Return values [N, K] in float32, padded with zeros to multiples of 16."""
        n, k = values.shape
        rows, columns = cls.get_padded_shape((n, k))
        return F.pad(values.float(), (0, columns - k, 0, rows - n))

    @classmethod
    def dequantize(cls, qdata, params):
        """Return the values, multiplied in float32 and rounded once to the logical dtype.

        The scale of the tensor alone is often too small for float16.
        """
        overruns = qdata.is_cuda and 2 * qdata.numel() % KITCHEN_ELEMENTS
        with kitchen_eager() if overruns else on_gpu_of(qdata):
            values = comfy_kitchen.dequantize_nvfp4(
                qdata, params.scale, params.block_scale, torch.float32
            )
        return values.to(params.orig_dtype)


NAME = "LowBitLinearNVFP4Layout"
register_layout_class(NAME, NVFP4Layout)


def quantize_weight(
    weight: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None
) -> QuantizedTensor:
    """Return weight · scale in NVFP4, of logical shape [N, K] and `dtype`.

    weight: [N, K] float, FP8 included, never written to. scale: of an FP8 weight, one element or
    [N, 1]. The arithmetic is float32. Raises ValueError when a value is NaN or Inf.
    """
    n, k = weight.shape
    height = max(PIECE_ELEMENTS // k // SCALE_BLOCK_ROWS, 1) * SCALE_BLOCK_ROWS

    def pieces():
        for start in range(0, n, height):
            piece = weight[start : start + height].float()
            rows = (
                scale[start : start + height] if scale is not None and scale.numel() > 1 else scale
            )
            yield piece if rows is None else piece * rows

    largest = torch.stack([piece.abs().amax() for piece in pieces()]).amax()
    if not torch.isfinite(largest):
        raise ValueError("the weight holds NaN or Inf")
    whole = NVFP4Layout.tensor_scale(largest)
    packed, blocks = zip(*(NVFP4Layout.pack(piece, whole) for piece in pieces()), strict=True)
    params = NVFP4Layout.Params(
        scale=whole, orig_dtype=dtype, orig_shape=(n, k), block_scale=torch.cat(blocks)
    )
    return QuantizedTensor(torch.cat(packed), NAME, params)


def nvfp4_linear(
    x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    """Return x · Wᵀ + bias, [..., N] of `out_dtype`; one step of a compiled graph.

    x: [..., K] bf16, fp16 or fp32. weight: [N, K] as `quantize_weight` gives it, on any device.
    """
    params = weight._params
    scales, wish = (params.scale, params.block_scale), arithmetic_of(weight)
    return _OP(x, weight._qdata, *scales, weight.shape[0], bias, out_dtype, wish)


def _run(x, packed, scale, block_scale, n, bias, out_dtype, wish):
    x = x.to(dtype_between(x.dtype, out_dtype))
    params = NVFP4Layout.Params(
        scale=scale.to(x.device),
        orig_dtype=x.dtype,
        orig_shape=(n, x.shape[-1]),
        block_scale=block_scale.to(x.device),
    )
    if bias is not None:
        bias = bias.to(x.device, bias.dtype if bias.dtype in OUTPUTS else out_dtype)
    weight = with_arithmetic(QuantizedTensor(packed.to(x.device), NAME, params), wish)
    return linear(x, weight, bias).to(out_dtype)


def _empty(x, packed, scale, block_scale, n, bias, out_dtype, wish):
    return x.new_empty((*x.shape[:-1], n), dtype=out_dtype)


_OP = custom_op(
    "nvfp4_linear(Tensor x, Tensor packed, Tensor scale, Tensor block_scale, SymInt n, "
    "Tensor? bias, ScalarType out_dtype, str arithmetic) -> Tensor",
    _run,
    _empty,
)
