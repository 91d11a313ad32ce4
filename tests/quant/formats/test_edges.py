"""Zeros, outliers, NaN, odd shapes and odd sources."""

import pytest
import torch

from lowbit.quant import formats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (1, 63), (63, 1), (1000, 100), (33, 272), (17, 256), (1, 512), (256, 48)]


def test_zero_weight_gives_zero(fmt):
    quantized, error = fmt.quantize_measured(torch.zeros(40, 256))
    assert error == 0
    assert not quantized.dequantize().any()


def test_zero_rows_and_blocks_give_zero_and_disturb_no_other(fmt, gaussian):
    weight = gaussian(40, 512)
    weight[3] = 0
    weight[7, 256:] = 0
    values = fmt.quantize(weight).dequantize()
    assert values.isfinite().all()
    assert not values[3].any()
    assert not values[7, 256:].any()
    assert (values - weight).norm() <= fmt.max_error * weight.norm()


def test_no_scale_of_a_tensor_or_row_is_zero(fmt, gaussian):
    """Block scales of one byte may be: 0 · stored is what a block of zeros means."""
    weight = gaussian(40, 256)
    weight[3] = 0
    for tensor in (weight, torch.zeros(40, 256)):
        packed = fmt.pack(fmt.quantize(tensor))
        for name in fmt.scales.values():
            if name in packed and name not in fmt.scale_dtypes:
                assert packed[name].isfinite().all()
                assert packed[name].all(), name


@pytest.mark.parametrize("size", [10.0, 1e4])
def test_one_outlier_stays_within_max_error(fmt, gaussian, size):
    weight = gaussian(64, 512)
    weight[5, 7] = -size
    values = fmt.quantize(weight).dequantize()
    wrong = (values - weight).norm()
    assert values.isfinite().all()
    # Where one step serves a whole row, each of its 512 values may be off by half of it.
    row = 512**0.5 * size / fmt.max / 2 if fmt.group is None and fmt.storage == torch.int8 else 0
    # Under a scale that is a power of two, E2M1 has nothing between 4 and 6: 5 is off by a fifth.
    own = size / 5 if fmt.name == "mxfp4" else 0
    assert wrong <= max(fmt.max_error * weight.norm(), row) + own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (20, 100), (-1, -1)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused(fmt, gaussian, dtype, place, bad):
    weight = gaussian(40, 256, dtype)
    weight[place] = bad
    with pytest.raises(formats.NotFiniteError, match="NaN or Inf"):
        fmt.quantize(weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes_come_back_or_the_reason_names_k(fmt, gaussian, shape):
    weight = gaussian(*shape)
    if shape[1] % fmt.k_multiple:
        reason = f"K={shape[1]} is not a multiple of {fmt.k_multiple}"
        assert fmt.unfit(shape) == reason
        with pytest.raises(ValueError, match=f"{fmt.name}: {reason}"):
            fmt.quantize(weight)
        return
    assert fmt.unfit(shape) is None
    quantized = fmt.quantize(weight)
    values = quantized.dequantize()
    assert quantized.shape == values.shape == shape
    # `max_error` is the mean over many values; a few may do twice as badly.
    assert (values - weight).norm() <= 2 * fmt.max_error * weight.norm()


@pytest.mark.parametrize(
    ("shape", "reason"), [((256,), "1-D"), ((2, 2, 256), "3-D"), ((0, 256), "empty"), ((4, 0), "")]
)
def test_what_is_no_matrix_is_refused(fmt, shape, reason):
    assert reason in fmt.unfit(shape)
    with pytest.raises(ValueError, match=fmt.name):
        fmt.quantize(torch.zeros(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_and_dtype_of_the_source_are_the_logical_ones(fmt, gaussian, dtype):
    quantized = fmt.quantize(gaussian(33, 256, dtype))
    assert (quantized.shape, quantized.dtype) == ((33, 256), dtype)
    assert quantized.dequantize().dtype == dtype


def sources(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return views that hold the values of `weight` in other strides."""
    n, k = weight.shape
    wide = torch.full((n, 2 * k + 3), torch.nan, dtype=weight.dtype)
    wide[:, 3::2] = weight
    tall = torch.full((2 * n, k), torch.nan, dtype=weight.dtype)
    tall[1::2] = weight
    return {
        "transposed": weight.t().contiguous().t(),
        "strided columns": wide[:, 3::2],
        "strided rows": tall[1::2],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["transposed", "strided columns", "strided rows"])
def test_strides_of_the_source_do_not_matter(fmt, gaussian, same_bits, dtype, view):
    weight = gaussian(20, 256, dtype)
    source = sources(weight)[view]
    assert not source.is_contiguous()
    got, want = fmt.pack(fmt.quantize(source)), fmt.pack(fmt.quantize(weight))
    assert got.keys() == want.keys()
    assert all(same_bits(got[name], want[name]) for name in want)


def test_repeated_row_is_read_as_such(fmt, gaussian, same_bits):
    row = gaussian(1, 256)
    got, want = fmt.quantize(row.expand(40, 256)), fmt.quantize(row.repeat(40, 1))
    assert same_bits(got._qdata, want._qdata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_source_is_never_written_to(fmt, gaussian, same_bits, dtype):
    weight = gaussian(40, 256, dtype)
    weight[3] = 0
    before, version = weight.clone(), weight._version
    fmt.quantize(weight).dequantize()
    fmt.quantize(weight).requantize_from_float(
        weight, scale="recalculate", stochastic_rounding=1, inplace_ops=False
    )
    assert same_bits(weight, before)
    assert weight._version == version


def test_result_of_a_parameter_needs_no_gradient(fmt, gaussian):
    quantized, _ = fmt.quantize_measured(torch.nn.Parameter(gaussian(40, 256)))
    assert all(not t.requires_grad for t in fmt.pack(quantized).values())
