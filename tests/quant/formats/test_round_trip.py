"""How far a weight is from what was quantized."""

import pytest
import torch

from lowbit.quant import formats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the relative L2 error, in float64."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def student_t(n: int, k: int) -> torch.Tensor:
    """Return [n, k] of Student's t with 3 degrees of freedom, whose outliers are huge."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(4, n, k, generator=generator)
    return 0.02 * normal[0] / normal[1:].square().mean(dim=0).sqrt()


def is_plain_integer(fmt: formats.Format) -> bool:
    """Whether one step of the grid serves a whole row that is not rotated."""
    return fmt.storage == torch.int8 and fmt.group is None and fmt.k_multiple == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_gaussian_weight_is_within_max_error(fmt, gaussian, dtype):
    """And not below half of it: a looser bound would hide a broken scale."""
    weight = gaussian(32, 1024, dtype)
    got = error(fmt.quantize(weight).to(torch.float32).dequantize(), weight)
    assert fmt.max_error / 2 <= got <= fmt.max_error


def test_error_of_wide_gaussian_weight_is_within_max_error(fmt, gaussian):
    """Wider rows have a larger largest value, hence coarser steps: K is 5120 in Wan 14B."""
    weight = gaussian(4, 5120)
    assert error(fmt.quantize(weight).dequantize(), weight) <= fmt.max_error


def test_error_of_heavy_tailed_weight_is_within_max_error(fmt):
    if is_plain_integer(fmt):
        pytest.skip("one outlier coarsens the steps of its whole row; that is what rotation is for")
    weight = student_t(32, 1024)
    # A few values carry half of the norm, so their own rounding does not average out.
    assert error(fmt.quantize(weight).dequantize(), weight) <= 1.25 * fmt.max_error


def test_rotation_halves_the_error_of_heavy_tailed_integers():
    weight = student_t(192, 1024)
    plain, rotated = (
        error(formats.get(name).quantize(weight).dequantize(), weight)
        for name in ("int8", "int8_convrot")
    )
    assert rotated < plain / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_error_is_the_error(fmt, gaussian, dtype):
    weight = gaussian(50, 256, dtype)
    quantized, measured = fmt.quantize_measured(weight)
    # float32 sums of 12,800 squares, in an order of their own
    assert measured == pytest.approx(error(quantized.to(torch.float32).dequantize(), weight), 1e-5)


@pytest.mark.parametrize("factor", [1e-4, 1e6])
def test_error_does_not_depend_on_the_size_of_the_weight(fmt, gaussian, factor):
    weight = gaussian(64, 512) * factor
    quantized, measured = fmt.quantize_measured(weight)
    assert measured <= fmt.max_error
    assert error(quantized.dequantize(), weight) <= fmt.max_error


def test_squares_of_huge_values_do_not_overflow_the_measured_error(fmt, gaussian):
    weight = gaussian(64, 512)
    weight[3, 5] = 1e30
    assert 0 <= fmt.quantize_measured(weight)[1] <= fmt.max_error


def test_squares_of_tiny_values_do_not_vanish_from_the_measured_error(gaussian):
    """Powers of two scale FP8 exactly, so the error is the same up to float32 sums of squares."""
    weight = gaussian(64, 512)
    fmt = formats.get("fp8_e4m3")
    want = fmt.quantize_measured(weight)[1]
    assert fmt.quantize_measured(weight * 2.0**-80)[1] == pytest.approx(want, rel=1e-6)
    assert want > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_in_16_bits_are_the_float32_values_rounded(fmt, quantized, dtype):
    """Scales of trained weights are subnormal in float16: they must not be multiplied in it."""
    weight = quantized(fmt, (160, 512))
    want = weight.dequantize()
    rounding = error(want.to(dtype), want)
    # One rounding is the best there is; comfy-kitchen's rotation back takes a second in places.
    assert error(weight.to(dtype).dequantize(), want) <= 2 * rounding


def test_quantizing_again_adds_no_error(fmt, gaussian, quantized):
    """The second time, nearly every value lies on the grid already."""
    once = quantized(fmt, (160, 512)).dequantize()
    assert error(fmt.quantize(once).dequantize(), once) <= fmt.max_error / 2
