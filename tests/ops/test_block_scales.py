"""E2M1 bytes, rounding, and scales at their limits."""

import pytest
import torch

from lowbit.ops import block_scales
from lowbit.ops.rounding import GRIDS

BYTES = torch.arange(256, dtype=torch.uint8)
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E8M0 = torch.float8_e8m0fnu


def quantizers(values: torch.Tensor):
    """Return name → (stored, scales as float32) of all three quantizers."""
    tensor_scale = (values.abs().amax() / 2688).clamp_min(torch.finfo(torch.float32).tiny)
    nvfp4, mxfp4, mxfp8 = (
        block_scales.nvfp4(values, tensor_scale),
        block_scales.mxfp4(values),
        block_scales.mxfp8(values),
    )
    return {
        "nvfp4": (*nvfp4, nvfp4[1].float() * tensor_scale),
        "mxfp4": (*mxfp4, mxfp4[1].float()),
        "mxfp8": (*mxfp8, mxfp8[1].float()),
    }


def test_all_bytes_are_even_column_high():
    values = block_scales.unpack_e2m1(BYTES.view(1, -1)).view(-1, 2)
    signed = torch.cat([GRID, -GRID])
    for byte in range(256):
        assert values[byte].tolist() == [signed[byte >> 4].item(), signed[byte & 15].item()]


def test_all_bytes_are_packed_as_they_were():
    values = block_scales.unpack_e2m1(BYTES.view(1, -1))
    assert torch.equal(block_scales.pack_e2m1(values), BYTES.view(1, -1))


@pytest.mark.parametrize("grid", ["e2m1", torch.float8_e4m3fn])
def test_rounding_is_to_nearest_and_ties_to_even(grid):
    """Against every point of the grid, the middles between them and what lies just beside."""
    points = GRID if grid == "e2m1" else torch.arange(127).byte().view(grid).float()
    middles = (points[1:] + points[:-1]) / 2
    up, down = torch.full_like(middles, torch.inf), torch.full_like(middles, -1.0)
    values = torch.cat([points, middles, middles.nextafter(up), middles.nextafter(down)])
    low = torch.arange(len(middles))
    even = torch.where(low % 2 == 0, points[:-1], points[1:])
    want = torch.cat([points, even, points[1:], points[:-1]])
    work = torch.empty_like(values), torch.empty_like(values)
    assert torch.equal(block_scales._round(values, grid, *work), want)
    beyond = torch.tensor([GRIDS[grid][2] * 2])
    assert block_scales._round(beyond, grid, beyond.clone(), beyond.clone()) == GRIDS[grid][2]


@pytest.mark.parametrize("size", [2.0**-126, 2.0**-60, 2.0**60, 2.0**127])
def test_smallest_and_largest_weights_keep_their_largest_value(size):
    values = torch.zeros(2, 64)
    values[0, 5] = -size
    for name, (stored, scales, real) in quantizers(values).items():
        codes = block_scales.unpack_e2m1(stored) if "fp4" in name else stored.float()
        got = (codes.view(2, real.shape[1], -1) * real.unsqueeze(-1)).view(2, 64)
        assert got.isfinite().all(), name
        # E2M1 under a power of two may be off by a fifth.
        assert abs(got[0, 5] + size) <= size / 5, name
        assert got.count_nonzero() == 1, name
        assert (scales.view(torch.uint8) != 0).sum() == 1, name


def test_blocks_far_below_the_rest_are_not_lost():
    """Their NVFP4 scale is subnormal, or below the smallest: then it is the smallest."""
    values = torch.zeros(1, 64)
    values[0, 0], values[0, 16:32], values[0, 32:48] = 1.0, 1e-5, 4e-7
    stored, scales, real = quantizers(values)["nvfp4"]
    got = block_scales.unpack_e2m1(stored).view(4, 16) * real.view(4, 1)
    assert scales.view(torch.uint8)[0, 1] < 8
    # Few scales are left to choose from: E2M1 alone is off by a fifth at most.
    assert ((got[1] - 1e-5).abs() <= 0.2e-5).all()
    assert scales.view(torch.uint8)[0, 2] == 1
    assert ((got[2] - 4e-7).abs() <= 4e-7).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_make_their_block_nan_and_no_other(bad):
    values = torch.ones(1, 64)
    values[0, 40] = bad
    for stored, scales in (block_scales.mxfp4(values), block_scales.mxfp8(values)):
        assert stored.shape[0] == 1
        assert scales.float().isnan().tolist() == [[False, True]]
    scales = block_scales.nvfp4(values, torch.tensor(1e-3))[1]
    assert scales.float().isnan().tolist() == [[False, False, True, False]]


@pytest.mark.parametrize("blocks", [1, 7, 64])
def test_result_does_not_depend_on_the_pieces(monkeypatch, blocks):
    values = torch.randn(40, 96, generator=torch.Generator().manual_seed(2))
    values[7, 32:] = 0
    want = quantizers(values)
    monkeypatch.setattr(block_scales, "PIECE_ELEMENTS", 32 * blocks)
    for name, got in quantizers(values).items():
        for part, other in zip(got, want[name], strict=True):
            assert torch.equal(part.view(torch.uint8), other.view(torch.uint8)), name


@pytest.mark.parametrize("top", [6.0, 448.0])
def test_scale_without_cutting_is_the_least(top):
    largest = torch.cat([torch.tensor([0.0]), torch.logspace(-30, 30, 500), top * 2.0 ** BYTES[:9]])
    codes = block_scales.e8m0_without_cutting(largest, top)
    scale = block_scales.e8m0_to_float(codes)
    assert codes[0] == 0
    assert (largest <= scale * top).all()
    assert (largest[1:] > scale[1:] * top / 2).all()


def test_e8m0_is_a_power_of_two_and_255_is_nan():
    got = block_scales.e8m0_to_float(BYTES)
    assert torch.equal(got[:-1].double(), torch.exp2(BYTES[:-1].double() - 127))
    assert got[-1].isnan()
