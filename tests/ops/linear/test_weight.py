"""Quantized weights as parameters: their data can be assigned, and is not written to by mistake."""

import copy

import pytest
import torch
from torch import nn

from lowbit.ops.linear.arithmetic import arithmetic_of, with_arithmetic
from lowbit.ops.linear.modules import converted
from lowbit.ops.linear.weight import Weight, parameter
from lowbit.quant import formats


@pytest.fixture(params=["int8_convrot", "fp8_e4m3", "nvfp4", "asym_w4a8_int8"])
def weight(request):
    dense = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    return parameter(formats.get(request.param).quantize(dense))


def test_data_that_is_assigned_moves_all_of_it(weight):
    held, want = {weight: 1}, weight.dequantize()
    here = weight.data.cpu()
    weight.data = weight.data.to("meta")
    names, _ = weight.__tensor_flatten__()
    assert weight.is_meta and all(getattr(weight, name).is_meta for name in names)
    assert type(weight) is Weight and isinstance(weight, nn.Parameter) and weight in held
    weight.data = here
    assert weight.device.type == "cpu" and torch.equal(weight.dequantize(), want)
    assert not weight.requires_grad


def test_copies_are_of_the_same_kind(weight):
    for made in (weight.data, weight.detach(), weight.to("meta"), weight.clone(), weight.half()):
        assert type(made) is Weight and made is not weight
    assert weight.half().dtype == torch.float16
    assert weight.data._qdata.data_ptr() == weight._qdata.data_ptr()


def test_other_data_is_refused(weight):
    before = weight.dequantize()
    other = formats.get("int8").quantize(torch.ones(64, 256))
    for source in (torch.zeros(64, 256), parameter(other), weight.data + 1):
        with pytest.raises(TypeError, match=r"is one such, not .*merge before quantizing"):
            weight.data = source
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("write", ["add_", "sub_", "mul_", "zero_", "iadd"])
def test_writing_into_it_is_refused_and_not_lost(weight, write):
    before = weight.dequantize()
    arguments = () if write == "zero_" else (torch.ones(64, 256).bfloat16(),)
    with torch.no_grad(), pytest.raises(TypeError, match="merge before quantizing"):
        if write == "iadd":
            weight.data += arguments[0]
        else:
            getattr(weight, write)(*arguments)
    assert torch.equal(weight.dequantize(), before)


LOST = {
    "out": lambda w, ones: torch.mul(ones, 3, out=w),
    "list": lambda w, ones: torch._foreach_add_([w], [ones]),
    "item": lambda w, ones: w.__setitem__(slice(0, 3), 5.0),
    "part": lambda w, ones: w[0:3].fill_(5.0),
    "part of parts": lambda w, ones: w.split(32)[1][3].zero_(),
    "flat": lambda w, ones: w.view(-1).add_(1),
    "transposed": lambda w, ones: w.data.t().mul_(2.0),
    "transposed list": lambda w, ones: torch._foreach_mul_([ones, w.t()], 2.0),
    "copy": lambda w, ones: w[0:3].copy_(ones[0:3]),
    "from itself": lambda w, ones: w.t().add_(w.clone().t()),
}


@pytest.mark.parametrize("write", LOST.values(), ids=LOST)
def test_writing_wherever_it_is_given_is_refused_and_not_lost(weight, write):
    before = weight.dequantize()
    # In inference mode torch itself refuses views.
    with torch.no_grad(), pytest.raises(TypeError, match="merge before quantizing"):
        write(weight, torch.ones(64, 256).bfloat16())
    assert torch.equal(weight.dequantize(), before)


def test_views_are_read_like_any_tensor(weight):
    want, x = weight.dequantize(), torch.ones(3, 256).bfloat16()
    assert torch.equal(weight[3:5], want[3:5]) and torch.equal(weight.view(-1)[7], want[0, 7])
    total = weight[3:5] + weight[5:7]
    assert type(total) is torch.Tensor and torch.equal(total.add_(1), want[3:5] + want[5:7] + 1)
    assert type(weight[3:5].clone()) is torch.Tensor
    assert torch.equal(weight + weight[0], want + want[0])
    assert weight[3].float().tolist() == want[3].float().tolist()
    assert repr(weight[3]) == repr(want[3]) and f"{weight[3, 0]:.3f}" == f"{want[3, 0]:.3f}"
    assert (weight[3].float().numpy() == want[3].float().numpy()).all()
    x.requires_grad_()
    (x @ weight[:7].t()).sum().backward()
    assert torch.allclose(x.grad[0].float(), want[:7].float().sum(0), atol=0.05)


def test_values_of_another_shape_are_not_copied_into_it(weight):
    before, fmt = weight.dequantize(), formats.of(weight)
    with pytest.raises(ValueError, match=r"\[64, 256\] takes no values \[1, 256\]"):
        weight.copy_(fmt.quantize(torch.ones(1, 256).bfloat16()))
    assert torch.equal(weight.dequantize(), before)
    weight.copy_(fmt.quantize(torch.ones(64, 256).bfloat16()))
    assert weight.dequantize().float().mean() > 0.9


def test_wish_for_an_arithmetic_keeps_the_kind():
    dense = torch.ones(64, 256).bfloat16()
    layer = nn.Linear(256, 64)
    layer.weight = parameter(formats.get("nvfp4").quantize(dense))
    layer.weight = with_arithmetic(layer.weight, "w4a16")
    assert type(layer.weight) is Weight and arithmetic_of(layer.weight) == "w4a16"
    assert not isinstance(with_arithmetic(layer.weight.data, "auto"), nn.Parameter)
    with pytest.raises(TypeError, match="merge before quantizing"):
        layer.weight.data.add_(1)


def test_arithmetic_of_a_weight_that_is_not_quantized_is_refused():
    with pytest.raises(TypeError, match=r"not quantized: a Parameter of torch\.float32"):
        with_arithmetic(nn.Linear(16, 16).weight, "w4a8")


def test_sharing_is_refused(weight):
    with pytest.raises(TypeError, match="load it in each"):
        weight.share_memory_()


def test_deep_copies_are_parameters_of_their_own(weight):
    first, second = copy.deepcopy([weight, weight])
    assert first is second and type(first) is Weight and isinstance(first, nn.Parameter)
    assert torch.equal(first.dequantize(), weight.dequantize())
    assert first._qdata.data_ptr() != weight._qdata.data_ptr()
    assert not isinstance(copy.deepcopy(weight.data), nn.Parameter)


def test_nobody_reads_it_at_its_address(weight, tmp_path):
    """safetensors would write what follows it in memory, too."""
    from safetensors.torch import save_file

    with pytest.raises(TypeError, match=r"lowbit\.save_model"):
        save_file({"weight": weight.data}, tmp_path / "file.safetensors")


def test_streams_and_pinning_reach_each_tensor(weight, monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: seen.append((self.shape, stream))
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    weight.data.record_stream("stream")
    names, _ = weight.__tensor_flatten__()
    assert seen == [(getattr(weight, name).shape, "stream") for name in names]
    pinned = weight.data.pin_memory()
    assert type(pinned) is Weight and torch.equal(pinned.dequantize(), weight.dequantize())
    assert pinned._qdata.data_ptr() != weight._qdata.data_ptr()


@pytest.mark.parametrize("name", formats.names())
def test_products_in_lowered_graphs_are_the_same(name):
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(256, 64, bias=False)
    dense = torch.randn(64, 256, generator=generator).bfloat16()
    module = converted(module, None, parameter(formats.get(name).quantize(dense)))
    x = torch.randn(3, 256, generator=generator).bfloat16()
    torch._dynamo.reset()
    with torch.inference_mode():
        got = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(got, module(x))
