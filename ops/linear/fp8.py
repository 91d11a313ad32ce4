"""`fp8_linear_forward`: the product of any `nn.Linear` whose weight is stored in FP8.

A weight stays as files have it, [N, K] and K-contiguous: its `.t()` is the column-major operand
that FP8 tensor cores want, and copying that again would make it row-major, which cuBLASLt refuses.
"""

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout, register_layout_class
from torch import nn

from ..custom_op import custom_op
from ..quantize_rows import INPUTS
from ..scaled_mm.check import FP8, K_MULTIPLE, OUTPUTS
from . import linear
from .activation import quantize_activation

E4M3 = torch.float8_e4m3fn


class FP8TensorLayout(TensorCoreFP8Layout):
    """FP8 payload [N, K] and one float32 scale, as backends are handed them."""

    scheme = "fp8_tensor"
    kitchen_layout = "TensorCoreFP8Layout"

    @classmethod
    def dequantize(cls, qdata, params):
        """Return stored · scale, multiplied in float32 and rounded once to the logical dtype."""
        return (qdata.float() * params.scale).to(params.orig_dtype)


class FP8RowLayout(FP8TensorLayout):
    """FP8 payload [N, K] and float32 scales [N, 1]."""

    scheme = "fp8_row"


LAYOUTS = {f"LowBitLinear{layout.__name__}": layout for layout in (FP8TensorLayout, FP8RowLayout)}
TENSOR, ROW = LAYOUTS
for _name, _layout in LAYOUTS.items():
    register_layout_class(_name, _layout)


def fp8_linear_forward(
    module: nn.Linear, base_dtype: torch.dtype, input: torch.Tensor
) -> torch.Tensor:
    """Return the output of `module` for `input`, [..., N], multiplied in 8 bits.

    module: its weight is [N, K] FP8, E4M3 or E5M2, on any device; real = stored · `scale_weight`,
    an attribute of one element or of N, 1 where it is absent or None. An attribute `scale_input`
    of one element is the activation's scale from a calibration; without one each token has its
    own, from its largest value. Any other weight: the forward of the module's class, unchanged.
    base_dtype: bf16, fp16 or fp32, of the output. input: [..., K] bf16, fp16 or fp32, one
    dimension or more, any strides, never written to. K and N that are no multiple of 16 are padded
    with zeros. NaN and Inf show in their token. There are no gradients: inference only.
    Raises TypeError or ValueError when dtypes or shapes do not fit.
    """
    weight = module.weight
    if isinstance(weight, QuantizedTensor) or weight.dtype not in FP8:
        return type(module).forward(module, input)
    check_base_dtype(base_dtype)
    if isinstance(input, QuantizedTensor):
        input = input.dequantize()
    check_input(input, weight)
    scale_weight = getattr(module, "scale_weight", None)
    scale_input = getattr(module, "scale_input", None)
    return _OP(input, weight, scale_weight, module.bias, scale_input, base_dtype)


def check_base_dtype(base_dtype: torch.dtype) -> None:
    """Raise TypeError for a dtype that no product gives."""
    if base_dtype not in OUTPUTS:
        raise TypeError(f"base_dtype is {base_dtype}; {', '.join(map(str, OUTPUTS))} are known")


def check_input(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise TypeError or ValueError when x is no activation [..., K] for weight [N, K]."""
    n, k = weight.shape
    if x.dtype not in INPUTS:
        raise TypeError(f"linear: input is {x.dtype}; cast it to {', '.join(map(str, INPUTS))}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"linear: input is {list(x.shape)}, weight [{n}, {k}] takes [..., {k}]")


def check_scale(name: str, scale: torch.Tensor, sizes: tuple[int, ...]) -> None:
    """Raise ValueError when a scale has another number of elements than one of `sizes`."""
    if scale.numel() not in sizes:
        wanted = " or ".join(map(str, sizes))
        raise ValueError(f"{name} is {list(scale.shape)}; {wanted} elements are wanted")


def dtype_between(given: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: the wider of both, but bf16, which holds all, where wanted.

    A float32 result, written to be rounded to bf16, would be the largest tensor of all.
    """
    return wanted if wanted == torch.bfloat16 else torch.promote_types(given, wanted)


def round_up(value: int) -> int:
    """Return the smallest multiple of 16, at least 16, that is not below `value`."""
    return max(-(-value // K_MULTIPLE), 1) * K_MULTIPLE


def _operand(weight: torch.Tensor) -> torch.Tensor:
    """Return weight [N, K] K-contiguous, its rows and their distances padded to multiples of 16."""
    if weight.stride(1) != 1 or weight.stride(0) % K_MULTIPLE or weight.stride(0) < weight.shape[1]:
        weight = weight.contiguous()
    n, k = weight.shape
    missing = (0, round_up(k) - k, 0, round_up(n) - n)
    if not any(missing):
        return weight
    return F.pad(weight.view(torch.uint8), missing).view(weight.dtype)


def _run(x, weight, scale_weight, bias, scale_input, out_dtype):
    (n, k), device = weight.shape, x.device
    weight = _operand(weight.to(device))
    rows, columns = weight.shape
    scale = torch.ones(1, device=device) if scale_weight is None else scale_weight
    check_scale("scale_weight", scale, (1, n))
    scale = scale.to(device, torch.float32).reshape(-1)
    # Tensors that fit go on as they are, what layers share of them included.
    x = x.to(dtype_between(x.dtype, out_dtype))
    x = x if x.stride(-1) == 1 else x.contiguous()
    x = x if columns == k else F.pad(x, (0, columns - k))
    if bias is not None:
        bias = bias.to(device, bias.dtype if bias.dtype in OUTPUTS else out_dtype)
    if rows > n:
        bias = None if bias is None else F.pad(bias, (0, rows - n))
        scale = scale if scale.numel() == 1 else F.pad(scale, (0, rows - n))
    if scale_input is not None:
        check_scale("scale_input", scale_input, (1,))
        scale_input = scale_input.to(device, torch.float32).reshape(1)
    out = _product(x, weight, scale, bias, scale_input)
    return out[..., :n].to(out_dtype).contiguous()


def _product(x, weight, scale, bias, scale_input):
    """Return x · (weight · scale)ᵀ + bias by the backend that is right for the device.

    Without a static scale E4M3 goes by rows: one scale per token, and channel. Where torch does the
    product, rows are not known for E5M2: it has one scale, and scales of channels follow it.
    """
    if weight.dtype != E4M3 and scale.numel() > 1:
        out = _product(x.float(), weight, torch.ones(1, device=x.device), None, scale_input) * scale
        return out if bias is None else out + bias
    if scale.numel() > 1 or (weight.dtype == E4M3 and scale_input is None):
        payload = _wrap(ROW, weight, scale.expand(weight.shape[0]).reshape(-1, 1), x.dtype)
    else:
        payload = _wrap(TENSOR, weight, scale.reshape(()), x.dtype)
    if scale_input is not None:
        x = quantize_activation(x, payload, input_scale=scale_input)
    return linear(x, payload, bias)


def _wrap(name: str, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
    params = LAYOUTS[name].Params(
        scale=scale.contiguous(), orig_dtype=dtype, orig_shape=tuple(weight.shape)
    )
    return QuantizedTensor(weight, name, params)


def _empty(x, weight, scale_weight, bias, scale_input, out_dtype):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


_OP = custom_op(
    "fp8_linear(Tensor x, Tensor weight, Tensor? scale_weight, Tensor? bias, Tensor? scale_input, "
    "ScalarType out_dtype) -> Tensor",
    _run,
    _empty,
)
