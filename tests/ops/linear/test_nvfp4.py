"""The NVFP4 weights of converted modules."""

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreNVFP4Layout
from torch import nn

from lowbit.ops.linear import convert_fp4_linear, nvfp4, with_arithmetic
from lowbit.ops.registry import NoBackendError
from lowbit.quant import formats
from tests.ops.linear.models import (
    E4M3,
    E5M2,
    LAYERS,
    NVFP4_ERROR,
    WIDTH,
    Model,
    converted,
    error,
    fp8_model,
    make,
    values_of,
)


def test_fp4_model_is_as_near_as_the_format():
    model, _ = converted("fp4")
    for name in LAYERS:
        linear, x = model.get_submodule(name), make(100, model.get_submodule(name).in_features)
        want = F.linear(x.double(), values_of(fp8_model()).get_submodule(name).weight)
        got = linear(x) if linear.bias is None else linear(x) - linear.bias
        assert error(got, want) <= NVFP4_ERROR


def test_nvfp4_weight_refuses_a_state_that_is_not():
    model, _ = converted("fp4")
    with pytest.raises(RuntimeError, match="Cannot copy"):
        model.load_state_dict(Model().state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, E4M3, E5M2])
@pytest.mark.parametrize(("n", "k"), [(80, 64), (1, 1), (33, 250), (300, 48)])
def test_nvfp4_payload_is_that_of_the_format(dtype, n, k, monkeypatch):
    """Packed two a byte, an E4M3 scale per 16, a float32 scale; in pieces, byte for byte."""
    monkeypatch.setattr(nvfp4, "PIECE_ELEMENTS", 1)
    linear = nn.Linear(k, n, dtype=torch.float32).requires_grad_(False)
    linear.weight.data = make(n, k)
    linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    parent, before = nn.Sequential(linear), linear.weight.clone()
    convert_fp4_linear(parent, torch.bfloat16)
    weight = parent[0].weight
    assert isinstance(weight, QuantizedTensor)
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype) == ((n, k), torch.bfloat16)
    rows, columns = TensorCoreNVFP4Layout.get_padded_shape((n, k))
    assert (weight._qdata.shape, weight._qdata.dtype) == ((rows, columns // 2), torch.uint8)
    assert weight._params.block_scale.dtype == E4M3
    assert (weight._params.scale.shape, weight._params.scale.dtype) == ((), torch.float32)
    want = formats.get("nvfp4").quantize(before.float())
    assert torch.equal(weight._qdata, want._qdata)
    assert torch.equal(weight._params.scale, want._params.scale)
    blocks = (w._params.block_scale.view(torch.uint8) for w in (weight, want))
    assert torch.equal(*blocks)
    assert torch.equal(linear.weight.float(), before.float())
    x = make(2, k).bfloat16()
    product = F.linear(x.double(), want.dequantize().double(), linear.bias.double())
    # The weight and the output are rounded to bf16.
    assert error(parent[0](x), product) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nvfp4_of_what_is_not_finite_is_refused_by_name(bad):
    model = Model()
    model.blocks[1].ffn[2].weight[3, 4] = bad
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.2: the weight holds NaN or Inf"):
        convert_fp4_linear(model, torch.float32)
    assert all(module is modules[name] for name, module in model.named_modules())


def test_nvfp4_of_what_is_not_loaded_or_quantized_is_refused():
    with pytest.raises(ValueError, match=r"head: its weight is on the meta device; load it"):
        convert_fp4_linear(Model().to("meta"), torch.float32, ("blocks",))
    model = Model()
    quantized = formats.get("int8").quantize(model.head.weight)
    model.head.weight = nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(ValueError, match=r"head: its weight is quantized already; keep it"):
        convert_fp4_linear(model, torch.float32)


def test_zero_nvfp4_weight_gives_the_bias():
    parent = nn.Sequential(nn.Linear(WIDTH, 20)).requires_grad_(False)
    parent[0].weight.zero_()
    convert_fp4_linear(parent, torch.float32)
    assert torch.equal(parent(make(3, WIDTH)), parent[0].bias.expand(3, -1))


def test_wish_for_an_arithmetic_reaches_the_product():
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    convert_fp4_linear(model, torch.bfloat16, set())
    weight = with_arithmetic(model[0].weight, "w4a8")
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(NoBackendError, match="w4a8: needs a device"):
        model(torch.ones(3, 64))


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("shape", "safe"), [((1, 1), False), ((48, 80), False), ((64, 64), True), ((16, 512), True)]
)
def test_weight_that_comfy_kitchens_kernel_would_write_beyond_is_dequantized_by_torch(
    monkeypatch, shape, safe
):
    weight = nvfp4.quantize_weight(make(*shape), torch.float32)
    want, entered, real = weight.dequantize(), [], nvfp4.kitchen_eager
    monkeypatch.setattr(nvfp4, "kitchen_eager", lambda: entered.append(shape) or real())
    assert torch.equal(weight.dequantize(), want) and not entered
    stored = weight._qdata.as_subclass(OnGpu)
    got = nvfp4.NVFP4Layout.dequantize(stored, weight._params).as_subclass(torch.Tensor)
    assert entered == ([] if safe else [shape])
    assert torch.equal(got[: shape[0], : shape[1]], want)
