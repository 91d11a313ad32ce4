"""comfy-kitchen's kernels behind our formats.

A weight of one of our layouts is shown to comfy-kitchen under the name of the layout that it
extends; the payload is the same. FP8 and block-scaled formats also quantize the activation, with a
scale taken from the activation itself (the host's own FP8 linear takes 1.0 when a file has none).
"""

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

from ..current_gpu import on_gpu_of
from ..custom_op import custom_op
from ..registry import Backend, Needs, register
from .activation import QuantizedActivation

ANY_DEVICE = frozenset({"cpu", "cuda"})
CUDA = frozenset({"cuda"})


def _as_kitchen(weight: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(weight._qdata, weight.layout_cls.kitchen_layout, weight._params)


def run_weight_only(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None):
    """Return x · Wᵀ + bias where comfy-kitchen's linear takes the float activation [M, K]."""
    bias = None if bias is None else bias.to(x.dtype)
    with on_gpu_of(x):
        return F.linear(x.contiguous(), _as_kitchen(weight), bias)


def run_convrot_w4a4(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None):
    """Return x · Wᵀ + bias for a `convrot_w4a4` weight, one step of a compiled graph."""
    p = weight._params
    options = (p.convrot_groupsize, p.quant_group_size, p.linear_dtype)
    return _CONVROT_W4A4(x, weight._qdata, p.scale, bias, *options)


def run_asym_w4a8(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None):
    """Return x · Wᵀ + bias for an `asym_w4a8_int8` weight, one step of a compiled graph."""
    p = weight._params
    scales = (p.scale, p.s_channel, p.correction, p.codebook)
    return _ASYM_W4A8(x, weight._qdata, *scales, bias, p.group_size, p.convrot_groupsize)


def _multiply(layout: str, x, stored, bias, **fields) -> torch.Tensor:
    shape = (stored.shape[0], x.shape[1])
    params = get_layout_class(layout).Params(orig_dtype=x.dtype, orig_shape=shape, **fields)
    bias = None if bias is None else bias.to(x.dtype)
    with on_gpu_of(x):
        return F.linear(x.contiguous(), QuantizedTensor(stored, layout, params), bias)


def _convrot_w4a4(x, stored, scale, bias, rotation, group, linear_dtype):
    fields = {"convrot_groupsize": rotation, "quant_group_size": group}
    layout = "TensorCoreConvRotW4A4Layout"
    return _multiply(layout, x, stored, bias, scale=scale, linear_dtype=linear_dtype, **fields)


def _asym_w4a8(x, stored, scale, s_channel, correction, codebook, bias, group, rotation):
    fields = {"s_channel": s_channel, "correction": correction, "codebook": codebook}
    options = {"group_size": group, "convrot_groupsize": rotation}
    return _multiply("AsymW4A8Int8Layout", x, stored, bias, scale=scale, **fields, **options)


def _empty(x: torch.Tensor, stored: torch.Tensor, *rest) -> torch.Tensor:
    return x.new_empty((x.shape[0], stored.shape[0]))


# comfy-kitchen keeps tables of its own for these, which torch.compile cannot look into.
_CONVROT_W4A4 = custom_op(
    "kitchen_convrot_w4a4(Tensor x, Tensor stored, Tensor scale, Tensor? bias, int rotation, "
    "int group, str linear_dtype) -> Tensor",
    _convrot_w4a4,
    _empty,
)
_ASYM_W4A8 = custom_op(
    "kitchen_asym_w4a8(Tensor x, Tensor stored, Tensor scale, Tensor s_channel, "
    "Tensor? correction, Tensor? codebook, Tensor? bias, int group, int rotation) -> Tensor",
    _asym_w4a8,
    _empty,
)


def run_quantized_input(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None):
    """Return x · Wᵀ + bias where comfy-kitchen's linear takes a quantized activation [M, K]."""
    layout = weight.layout_cls.kitchen_layout
    bias = None if bias is None else bias.to(x.dtype)
    with on_gpu_of(x):
        quantized = QuantizedTensor.from_float(x.contiguous(), layout, scale="recalculate")
        return F.linear(quantized, _as_kitchen(weight), bias)


def run_static(x: QuantizedActivation, weight: QuantizedTensor, bias: torch.Tensor | None):
    """Return x · Wᵀ + bias for an FP8 activation; comfy-kitchen takes one scale, not one a row."""
    if x.scale.numel() != 1:
        return run_quantized_input(x.dequantize().reshape(x.stored.shape), weight, bias)
    layout = weight.layout_cls.kitchen_layout
    params = get_layout_class(layout).Params(
        scale=x.scale.reshape(()), orig_dtype=x.dtype, orig_shape=tuple(x.stored.shape)
    )
    bias = None if bias is None else bias.to(x.dtype)
    with on_gpu_of(x.stored):
        return F.linear(QuantizedTensor(x.stored, layout, params), _as_kitchen(weight), bias)


def _register(schemes: set[str], run, run_quantized=None, **needs) -> None:
    needs = Needs(frozenset(schemes), **needs)
    register(Backend("linear", "kitchen", 20, needs, run, run_quantized))


_register({"int8_row", "int8_row_convrot"}, run_weight_only, devices=ANY_DEVICE, capability=(7, 5))
_register({"convrot_w4a4"}, run_convrot_w4a4, devices=ANY_DEVICE, capability=(7, 5))
_register({"asym_w4a8_int8"}, run_asym_w4a8, devices=ANY_DEVICE, capability=(8, 0))
_register(
    {"fp8_tensor"},
    run_quantized_input,
    run_static,
    devices=CUDA,
    capability=(8, 9),
    k_multiple=16,
    n_multiple=16,
)
_register({"mxfp8", "nvfp4"}, run_quantized_input, devices=CUDA, capability=(10, 0))
