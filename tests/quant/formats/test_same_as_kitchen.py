"""Payload and scales, byte for byte, against comfy-kitchen's own quantizers.

Block scales that are chosen by their error (`test_by_error.py`) take the first candidate here,
which is comfy-kitchen's.
"""

import math

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops import block_scales
from lowbit.quant import formats
from lowbit.quant.formats import base

DTYPES = (torch.float32, torch.bfloat16)
# Formats for which comfy-kitchen has no quantizer of a whole weight.
OURS_ALONE = {"fp8_row", "mxfp4"}


@pytest.fixture
def first_candidate(monkeypatch):
    """Block scales are the first candidate of each block."""
    monkeypatch.setattr(block_scales, "_best", lambda _, __, candidates, ___: next(candidates))


def by_kitchen(fmt: formats.Format, weight: torch.Tensor) -> QuantizedTensor:
    """Return `weight`, as float32, by the quantizer of the layout that the format extends."""
    options = dict(fmt.quantize_kwargs)
    if hasattr(fmt.layout, "dtype"):
        options["dtype"] = fmt.layout.dtype
    return QuantizedTensor.from_float(weight.float(), fmt.layout.kitchen_layout, **options)


def assert_same(fmt, got: QuantizedTensor, want: QuantizedTensor, same_bits) -> None:
    assert same_bits(got._qdata, want._qdata)
    for name in fmt.scales:
        ours, theirs = getattr(got._params, name), getattr(want._params, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or same_bits(ours, theirs), name


def assert_nearly_same(fmt, got: QuantizedTensor, want: QuantizedTensor) -> None:
    assert (got._qdata != want._qdata).float().mean() < 1e-3
    for name in fmt.scales:
        ours, theirs = getattr(got._params, name), getattr(want._params, name)
        if ours is not None:
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 512), (1, 256)])
def test_bytes_are_those_of_kitchen(fmt, gaussian, same_bits, first_candidate, shape, dtype):
    if fmt.layout.scheme in OURS_ALONE:
        pytest.skip("comfy-kitchen has no such format")
    weight = gaussian(*shape, dtype)
    assert_same(fmt, fmt.quantize(weight), by_kitchen(fmt, weight), same_bits)


def test_bytes_of_padded_weight_are_those_of_kitchen(fmt, gaussian, same_bits, first_candidate):
    weight = gaussian(37, 100)
    if fmt.unfit(weight.shape) or fmt.layout.scheme in OURS_ALONE:
        pytest.skip("K=100 does not fit, or comfy-kitchen has no such format")
    assert_same(fmt, fmt.quantize(weight), by_kitchen(fmt, weight), same_bits)


def test_rows_of_rowwise_fp8_are_tensors_of_kitchen(gaussian, same_bits):
    weight = gaussian(9, 300)
    tensorwise = formats.get("fp8_e4m3")
    got = formats.get("fp8_e4m3_rowwise").quantize(weight)
    for i in range(9):
        row = by_kitchen(tensorwise, weight[i : i + 1])
        assert same_bits(got._qdata[i : i + 1], row._qdata)
        assert same_bits(got._params.scale[i, 0], row._params.scale)


@pytest.mark.parametrize("n", [129, 256])
def test_bytes_do_not_depend_on_the_pieces(fmt, gaussian, same_bits, monkeypatch, n):
    """The tensor's largest value and a zero block lie in different pieces."""
    weight = gaussian(n, 256)
    weight[n - 1, 17] = 0.3
    weight[: base.SCALE_BLOCK_ROWS, :64] = 0
    whole, whole_error = fmt.quantize_measured(weight)
    # rounded up to a block of scales
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 1000)
    ticks = []
    pieces, error = fmt.quantize_measured(weight, lambda: ticks.append(1))
    assert len(ticks) == math.ceil(n / base.SCALE_BLOCK_ROWS)
    assert pieces.shape == weight.shape
    if fmt.k_multiple == 1:
        assert_same(fmt, pieces, whole, same_bits)
        assert error == pytest.approx(whole_error, 1e-6)
    else:
        # The product with the Hadamard matrix sums in another order when a piece has few rows;
        # a value at the edge between two codes may fall to the other side.
        assert_nearly_same(fmt, pieces, whole)


def test_tick_that_raises_stops_between_pieces(fmt, gaussian, monkeypatch):
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 1)
    with pytest.raises(KeyboardInterrupt):
        fmt.quantize_measured(gaussian(300, 256), lambda: (_ for _ in ()).throw(KeyboardInterrupt))
