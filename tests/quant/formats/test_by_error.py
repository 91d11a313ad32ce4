"""Block scales chosen by their error: never worse than comfy-kitchen's, and read by it as by us."""

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.float_utils import from_blocked, to_blocked
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops.kitchen import kitchen_eager
from lowbit.ops.linear.nvfp4 import quantize_weight
from lowbit.quant import formats
from tests.block_data import IN_KITCHEN, KINDS, NAMES, made, others


def squared(values: torch.Tensor, weight: torch.Tensor, group: int) -> torch.Tensor:
    """Return the squared error of each block, float64."""
    return (values.double() - weight.double()).square().view(-1, group).sum(dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_block_errs_more_than_kitchens(name, kind):
    fmt, weight = formats.get(name), made(kind)
    ours = squared(fmt.quantize(weight).dequantize(), weight, fmt.group)
    theirs = squared(others(name, weight), weight, fmt.group)
    # Errors are compared in float32, whose sums of 32 squares are off by a few units of 2^-24.
    assert (ours <= theirs * (1 + 2**-18)).all()
    assert ours.sum() <= theirs.sum()


def test_no_mxfp8_block_gains_by_half_its_scale_or_twice():
    """Not even where only one candidate is tried: the largest values lie all over a binade."""
    fmt = formats.get("mxfp8")
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(2048, 32, generator=generator)
    weight *= torch.linspace(1, 2, 2048).unsqueeze(1) / weight.abs().amax(dim=1, keepdim=True)
    # Some of the others so small that their steps are absolute.
    weight[:, 20:] *= 1e-4
    quantized = fmt.quantize(weight)
    scale = fmt.layout.unswizzled(quantized._params.scale, 2048, 32)
    ours = squared(quantized.dequantize(), weight, 32)
    assert scale.unique().numel() > 1
    for factor in (0.5, 2):
        codes = (weight / (scale * factor)).clamp(-fmt.max, fmt.max).to(fmt.storage)
        others_error = squared(codes.float() * scale * factor, weight, 32)
        assert (ours <= others_error * (1 + 2**-18)).all()


def error(values: torch.Tensor, weight: torch.Tensor) -> float:
    """Return the relative L2 error, in float64."""
    return ((values.double() - weight.double()).norm() / weight.double().norm()).item()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "one huge value"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_four_bits_err_less_than_kitchens(name, kind):
    """A few columns that carry the norm gain 3%, all else more."""
    weight = made(kind)
    ours = error(formats.get(name).quantize(weight).dequantize(), weight)
    assert ours < 0.98 * error(others(name, weight), weight)


def test_error_of_gaussian_nvfp4_is_an_eighth_below_kitchens():
    weight = made("gaussian")
    ours = error(formats.get("nvfp4").quantize(weight).dequantize(), weight)
    assert ours < 7 / 8 * error(others("nvfp4", weight), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 1024), (37, 100), (1, 32)])
@pytest.mark.parametrize("name", IN_KITCHEN)
def test_kitchen_reads_the_very_values(gaussian, name, shape, dtype):
    fmt = formats.get(name)
    weight = fmt.quantize(gaussian(*shape, dtype)).to(torch.float32)
    with kitchen_eager():
        read = QuantizedTensor(weight._qdata, fmt.layout.kitchen_layout, weight._params)
        assert torch.equal(read.dequantize(), weight.dequantize())


def test_mxfp4_is_nvfp4s_packing_under_mxfp8s_scales(quantized):
    """The halves that comfy-kitchen does know, put together."""
    weight = quantized(formats.get("mxfp4"), (160, 512))
    ones = to_blocked(torch.ones(160, 512 // 16).to(torch.float8_e4m3fn), flatten=False)
    with kitchen_eager():
        codes = comfy_kitchen.dequantize_nvfp4(
            weight._qdata, torch.ones(()), ones, torch.float32
        ).to(torch.float8_e4m3fn)
        want = comfy_kitchen.dequantize_mxfp8(codes, weight._params.scale, torch.float32)
    assert torch.equal(weight.dequantize(), want)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_zero_blocks_have_scale_zero(gaussian, name):
    fmt = formats.get(name)
    weight = gaussian(37, 128)
    weight[3, :64] = 0
    params = fmt.quantize(weight)._params
    scale = getattr(params, "block_scale", params.scale).view(torch.uint8)
    columns = 128 // fmt.group
    flat = from_blocked(scale, num_rows=128, num_cols=columns)
    assert not flat[37:].any()
    assert not flat[3, : 64 // fmt.group].any()
    assert flat[:3].all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_requantizing_with_a_seed_cuts_nothing_off(gaussian, name):
    fmt, weight = formats.get(name), gaussian(48, 1024)
    base, sums = fmt.quantize(weight), torch.zeros_like(weight)
    largest = weight.view(-1, fmt.group).abs().argmax(dim=1, keepdim=True)
    for seed in range(1, 17):
        sums += base.requantize_from_float(weight, stochastic_rounding=seed).dequantize()
    mean, want = ((v.view(-1, fmt.group).gather(1, largest)) for v in (sums / 16, weight))
    # 16 · 1,536 roundings, each off by a step of at most a third: 4 deviations of their mean.
    assert abs((mean.abs().mean() / want.abs().mean()).item() - 1) < 4 / 3 / (16 * 1536) ** 0.5


@pytest.mark.parametrize("name", IN_KITCHEN)
def test_requantizing_with_a_seed_takes_kitchens_scales(gaussian, same_bits, name):
    fmt, weight = formats.get(name), gaussian(48, 1024)
    got = fmt.quantize(weight).requantize_from_float(weight, stochastic_rounding=3)
    with kitchen_eager():
        want = QuantizedTensor.from_float(weight, fmt.layout.kitchen_layout)
    for part in fmt.scales:
        assert same_bits(getattr(got._params, part), getattr(want._params, part))


def test_fp4_linear_has_the_formats_bytes(gaussian, same_bits):
    weight = gaussian(64, 256)
    got, want = quantize_weight(weight, torch.bfloat16), formats.get("nvfp4").quantize(weight)
    assert same_bits(got._qdata, want._qdata)
    assert same_bits(got._params.block_scale, want._params.block_scale)
