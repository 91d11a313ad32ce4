"""The Triton kernels on the CPU, in Triton's interpreter; `test_interpreted.py` runs this file.

Not bf16: `tl.dot` is wrong with it in the interpreter.
"""

import pytest
import torch

from lowbit.ops.quantize_rows import reference as rows_reference
from lowbit.ops.quantize_rows import triton as rows_triton
from lowbit.ops.scaled_mm import reference as mm_reference
from lowbit.ops.scaled_mm import triton as mm_triton
from lowbit.ops.scaled_mm.tiles import Tile

FP8 = torch.float8_e4m3fn
TILES = [Tile(16, 32, 32), Tile(16, 32, 32, tma=True), Tile(32, 16, 64, group_m=1, flatten=True)]


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def product(a, b, scale_a, scale_b, bias=None, zero_point=None, total=None, *, tile, out):
    """The kernel's result, of a buffer poisoned with NaN, on three processors."""
    got = torch.full((a.shape[0], b.shape[0]), torch.nan, dtype=out)
    mm_triton.run_tile(got, a, b, scale_a, scale_b, bias, zero_point, total, tile, 3)
    return got


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (37, 50, 96), (64, 32, 64)], ids=str)
@pytest.mark.parametrize("out", [torch.float32, torch.float16])
def test_int8_product_is_that_of_the_reference(tile, shape, out):
    m, n, k = shape
    a, b = integers(m, k), integers(n, k, seed=1)
    scales = (make(m, 1).abs() * 1e-3, make(n, 1, seed=1).abs() * 1e-2)
    bias = make(n, seed=2)
    want = mm_reference.run(a, b, *scales, bias, None, None, out)
    # The last bit may differ: a product and a sum are rounded as one.
    torch.testing.assert_close(product(a, b, *scales, bias, tile=tile, out=out), want)


def test_zero_point_and_scalar_scales_are_those_of_the_reference():
    a, b, one = integers(9, 32), integers(11, 32, seed=1), torch.tensor(0.25)
    zero_point = torch.arange(9, dtype=torch.int32)
    total = b.sum(1, dtype=torch.int32)
    want = mm_reference.run(a, b, one, one, None, zero_point, total, torch.float32)
    got = product(a, b, one, one, None, zero_point, total, tile=TILES[0], out=torch.float32)
    assert torch.equal(got, want)


def test_rows_that_lie_apart_and_start_anywhere():
    a = integers(1 + 20 * 48)[1:].reshape(20, 48)[:, :32]
    b, one = integers(8, 32), torch.ones(1)
    want = mm_reference.run(a, b, one, one, None, None, None, torch.float32)
    assert torch.equal(product(a, b, one, one, tile=TILES[1], out=torch.float32), want)


@pytest.mark.parametrize("dtype_b", [FP8, torch.float8_e5m2])
def test_fp8_product_is_that_of_the_reference(dtype_b):
    a, b, one = make(20, 64).to(FP8), make(8, 64, seed=1).to(dtype_b), torch.ones(1)
    want = mm_reference.run(a, b, one, one, None, None, None, torch.float32)
    torch.testing.assert_close(product(a, b, one, one, tile=TILES[1], out=torch.float32), want)


@pytest.mark.parametrize("source", [torch.float16, torch.float32])
@pytest.mark.parametrize(("k", "rotate"), [(256, True), (1792, True), (16, False), (1000, False)])
def test_int8_rows_are_those_of_the_reference(source, k, rotate):
    x = make(5, k, dtype=source)
    x[1] = 0
    stored, scale = rows_triton.run(x, torch.int8, rotate)
    want, want_scale = rows_reference.run(x, torch.int8, rotate)
    torch.testing.assert_close(scale, want_scale)
    # Sums of the rotation in another order: a value near half a step may go the other way.
    assert (stored.int() - want.int()).abs().max() <= (1 if rotate else 0)
    assert (stored != want).float().mean() <= (0.01 if rotate else 0)


@pytest.mark.parametrize("rotate", [True, False])
def test_fp8_rows_are_near_those_of_the_reference(rotate):
    """Near: in the interpreter a mantissa that rounds up does not carry into the exponent."""
    x = make(5, 512)
    stored, scale = rows_triton.run(x, FP8, rotate)
    want, want_scale = rows_reference.run(x, FP8, rotate)
    torch.testing.assert_close(scale, want_scale)
    near = torch.isclose(stored.float(), want.float(), rtol=2**-3, atol=2**-9)
    assert near.float().mean() > 0.95


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rotate", [True, False])
def test_scale_shows_a_token_that_is_not_finite(bad, rotate):
    x = make(3, 512)
    x[1, 300] = bad
    _, scale = rows_triton.run(x, torch.int8, rotate)
    assert torch.isfinite(scale).flatten().tolist() == [True, False, True]


def test_strided_rows_are_read_where_they_lie():
    x = torch.full((9, 600), torch.nan)
    x[::2, :256] = make(5, 256)
    got = rows_triton.run(x[::2, :256], torch.int8, True)
    want = rows_triton.run(x[::2, :256].clone(), torch.int8, True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
