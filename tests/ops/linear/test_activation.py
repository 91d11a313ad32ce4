"""Activations quantized once: explicit objects, announced sharing, what refuses and what resets."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops import linear as package
from lowbit.ops import registry
from lowbit.ops.linear import (
    OP,
    QuantizedActivation,
    activation,
    linear,
    quantize_activation,
    release,
    share,
    sharing,
)
from lowbit.ops.linear import triton as backend
from lowbit.ops.quantize_rows import Prologue
from lowbit.quant import formats

EIGHT_BIT = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3_rowwise", "int8", "int8_convrot")
# 4-bit weights are re-expressed in 8 bits: `test_four_bit.py`.
OTHERS = sorted(set(formats.names()) - set(EIGHT_BIT) - {"nvfp4", "mxfp4"})
FP8 = torch.float8_e4m3fn


def make(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(name: str, seed: int = 1) -> QuantizedTensor:
    return formats.get(name).quantize(make(33, 512, seed=seed))


@pytest.fixture
def quantizing(monkeypatch):
    """Let the backend that multiplies quantized activations run here; return its quantizations."""
    calls = []
    quantize = activation.quantize_activation

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return quantize(*args, **kwargs)

    def run(x, weight, bias):
        return backend.run_quantized(x, weight, bias, "reference")

    ours = registry.Backend(OP, "ours", 0, registry.Needs(frozenset()), run, run, quantizes=True)
    select = registry.select

    def chosen(op, call, name="auto"):
        return ours if op == OP else select(op, call, name)

    monkeypatch.setattr(package, "quantize_activation", counted)
    monkeypatch.setattr(registry, "select", chosen)
    return calls


@pytest.mark.parametrize("name", EIGHT_BIT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_activation_serves_several_layers(name, dtype, quantizing):
    x, weights = make(2, 5, 512, dtype=dtype), [weight_of(name, seed) for seed in (1, 2, 3)]
    alone = [linear(x, w) for w in weights]
    shared = quantize_activation(x, weights[0])
    assert isinstance(shared, QuantizedActivation)
    for weight, want in zip(weights, alone, strict=True):
        got = linear(shared, weight)
        assert (got.shape, got.dtype) == ((2, 5, 33), dtype)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_dequantized_activation_is_x_up_to_its_rounding(name):
    x = make(2, 5, 512)
    got = quantize_activation(x, weight_of(name)).dequantize()
    error = (got - x).norm() / x.norm()
    like = {"fp8_e5m2": "fp8_e4m3_rowwise", "fp8_e4m3": "fp8_e4m3_rowwise"}.get(name, name)
    assert 0 < error <= formats.get(like).max_error


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_refuse_an_activation_in_8_bits(name):
    with pytest.raises(ValueError, match="take no 8-bit activation; give the linear layer x"):
        quantize_activation(make(5, 512), weight_of(name))


def test_activation_of_another_kind_is_refused():
    x = quantize_activation(make(5, 512), weight_of("int8"))
    with pytest.raises(ValueError, match=r"rotation=0.*the weight multiplies.*rotation=256"):
        linear(x, weight_of("int8_convrot"))
    with pytest.raises(ValueError, match="comes before the quantization of x"):
        linear(x, weight_of("int8"), input_act="gelu_tanh")


@pytest.mark.parametrize("name", formats.names())
def test_activation_before_the_layer(name):
    x, weight = make(5, 512), weight_of(name)
    got = linear(x, weight, input_act="gelu_tanh")
    assert torch.equal(got, linear(F.gelu(x, approximate="tanh"), weight))
    with pytest.raises(ValueError, match="activation is 'relu'; known are"):
        linear(x, weight, input_act="relu")


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_activation_joins_the_quantizer(name, quantizing):
    x, weight = make(5, 512), weight_of(name)
    fused = linear(x, weight, input_act="gelu_tanh")
    assert quantizing[0]["prologue"] == Prologue(activation="gelu_tanh")
    apart = linear(F.gelu(x, approximate="tanh"), weight)
    torch.testing.assert_close(fused, apart)


def test_norm_and_modulation_join_the_quantizer():
    x, weight = make(2, 3, 512), weight_of("int8_convrot")
    scale, shift = make(2, 512, seed=2), make(2, 512, seed=3)
    prologue = Prologue("layer", scale=scale, shift=shift)
    got = quantize_activation(x, weight, prologue=prologue).dequantize()
    want = F.layer_norm(x, (512,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert (got - want).norm() <= formats.get("int8_convrot").max_error * 1.5 * want.norm()


def test_announced_input_is_quantized_once_and_left_as_it_was(quantizing):
    x, weights = make(5, 512), [weight_of("int8", seed) for seed in (1, 2, 3)]
    alone = [linear(x, w) for w in weights]
    assert len(quantizing) == 3
    together = []
    for weight in weights:
        share(x, 3)
        together.append(linear(x, weight))
        release(x)
    assert len(quantizing) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not hasattr(x, sharing.ATTRIBUTE)


def test_readers_of_two_kinds_share_each_their_own(quantizing):
    x = make(5, 512)
    share(x, 4)
    for name in ("int8", "int8_convrot", "int8", "int8_convrot"):
        linear(x, weight_of(name))
    assert len(quantizing) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensor_that_is_used_again_is_quantized_anew(mode, quantizing):
    """Also where a reader took a way that quantizes nothing, as one with a LoRA does."""
    weight = weight_of("int8")
    with mode():
        x = make(5, 512)
        for factor in (1, -3):
            x.mul_(factor)
            for reads in (True, True, False):
                share(x, 3)
                got = linear(x, weight) if reads else None
                release(x)
                if reads:
                    assert torch.equal(got, linear(x.clone(), weight))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_next_tensor_is_quantized_anew(mode, quantizing):
    weight = weight_of("int8")
    with mode():
        for seed in range(3):
            x = make(5, 512, seed=seed)
            share(x, 2)
            first, second = linear(x, weight), linear(x, weight)
            assert torch.equal(first, second)
    assert len(quantizing) == 3


def test_write_between_readers_is_seen_outside_inference_mode(quantizing):
    x, weight = make(5, 512), weight_of("int8")
    share(x, 2)
    linear(x, weight)
    x.mul_(-3)
    torch.testing.assert_close(linear(x, weight), linear(x.clone(), weight))


def test_quantized_form_lives_no_longer_than_its_tensor(quantizing):
    x = make(5, 512)
    share(x, 2)
    linear(x, weight_of("int8"))
    (form,) = getattr(x, sharing.ATTRIBUTE).forms.values()
    alive = weakref.ref(form.stored)
    del form, x
    gc.collect()
    assert alive() is None


def test_static_fp8_activation_of_the_host_is_multiplied_as_it_is(quantizing):
    weight, x = weight_of("fp8_e4m3"), make(5, 512)
    layout = weight.layout_cls.__name__
    quantized = QuantizedTensor.from_float(x, layout, scale=torch.tensor(0.02))
    got = linear(quantized, weight)
    want = quantized.dequantize() @ weight.dequantize().t()
    assert not quantizing
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_quantized_layer_is_one_graph():
    weight = weight_of("int8_convrot")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        share(x, 2)
        return linear(x, weight), linear(x, weight, input_act="gelu_tanh")

    x = make(5, 512)
    for got, want in zip(
        run(x), (linear(x, weight), linear(x, weight, input_act="gelu_tanh")), strict=True
    ):
        assert torch.equal(got, want)


def test_empty_activation_gives_an_empty_result():
    weight = weight_of("int8_convrot")
    x = quantize_activation(make(0, 512), weight)
    assert linear(x, weight).shape == (0, 33)
    with pytest.raises(ValueError, match="activation is 'silu'"):
        linear(make(0, 512), weight, input_act="silu")


def test_one_rotated_row_of_the_host_is_dequantized():
    weight, x = weight_of("int8_convrot"), make(1, 512)
    row = formats.get("int8_convrot").quantize(x)
    got = linear(row, weight)
    want = row.dequantize() @ weight.dequantize().t()
    assert (got - want).norm() <= formats.get("int8_convrot").max_error * 2 * want.norm()
