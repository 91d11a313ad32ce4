"""The Triton kernels on the CPU, in Triton's interpreter; `test_interpreted.py` runs this file.

Not bf16: `tl.dot` is wrong with it in the interpreter.
"""

import pytest
import torch

from lowbit.ops.quantize_rows import NOTHING, interleave
from lowbit.ops.quantize_rows import reference as rows_reference
from lowbit.ops.quantize_rows import triton as rows_triton
from lowbit.ops.scaled_mm import reference as mm_reference
from lowbit.ops.scaled_mm import triton as mm_triton
from lowbit.ops.scaled_mm.tiles import Tile
from tests.ops.recorded import only_launches

FP8 = torch.float8_e4m3fn
BLOCK_TILES = [Tile(16, 32, 128), Tile(32, 128, 128, tma=True, warps=1, flatten=True)]
TILES = [Tile(16, 32, 32), Tile(16, 32, 32, tma=True), Tile(32, 16, 64, group_m=1, flatten=True)]


@pytest.fixture(autouse=True)
def recorded():
    """Whatever is recorded is found out if it does more than launch."""
    with only_launches() as counts:
        yield counts


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def product(a, b, scale_a, scale_b, bias=None, zero_point=None, total=None, *rest, tile, out):
    """The kernel's result, of a buffer poisoned with NaN, on three processors."""
    got = torch.full((a.shape[0], b.shape[0]), torch.nan, dtype=out)
    mm_triton.run_tile(got, a, b, scale_a, scale_b, bias, zero_point, total, tile, 3, *rest)
    return got


def wanted(a, b, scale_a, scale_b, bias=None, zero_point=None, total=None, *rest, out):
    """The reference's result; rest: activation, gate and residual."""
    rest = rest or (None, None, None)
    return mm_reference.run(a, b, scale_a, scale_b, bias, zero_point, total, *rest, out)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (37, 50, 96), (64, 32, 64)], ids=str)
@pytest.mark.parametrize("out", [torch.float32, torch.float16])
def test_int8_product_is_that_of_the_reference(tile, shape, out):
    m, n, k = shape
    a, b = integers(m, k), integers(n, k, seed=1)
    scales = (make(m, 1).abs() * 1e-3, make(n, 1, seed=1).abs() * 1e-2)
    bias = make(n, seed=2)
    want = wanted(a, b, *scales, bias, out=out)
    # The last bit may differ: a product and a sum are rounded as one.
    torch.testing.assert_close(product(a, b, *scales, bias, tile=tile, out=out), want)


def test_zero_point_and_scalar_scales_are_those_of_the_reference():
    a, b, one = integers(9, 32), integers(11, 32, seed=1), torch.tensor(0.25)
    zero_point = torch.arange(9, dtype=torch.int32)
    total = b.sum(1, dtype=torch.int32)
    want = wanted(a, b, one, one, None, zero_point, total, out=torch.float32)
    got = product(a, b, one, one, None, zero_point, total, tile=TILES[0], out=torch.float32)
    assert torch.equal(got, want)


def test_rows_that_lie_apart_and_start_anywhere():
    a = integers(1 + 20 * 48)[1:].reshape(20, 48)[:, :32]
    b, one = integers(8, 32), torch.ones(1)
    want = wanted(a, b, one, one, out=torch.float32)
    assert torch.equal(product(a, b, one, one, tile=TILES[1], out=torch.float32), want)


@pytest.mark.parametrize("dtype_b", [FP8, torch.float8_e5m2])
def test_fp8_product_is_that_of_the_reference(dtype_b):
    a, b, one = make(20, 64).to(FP8), make(8, 64, seed=1).to(dtype_b), torch.ones(1)
    want = wanted(a, b, one, one, out=torch.float32)
    torch.testing.assert_close(product(a, b, one, one, tile=TILES[1], out=torch.float32), want)


def blocks(m, n, k):
    """Scales for blocks; those of a in columns side by side, as some quantizers write them."""
    columns, rows = -(-k // 128), -(-n // 128)
    return make(columns, m).abs().t() * 1e-2, make(rows, columns, seed=1).abs()


@pytest.mark.parametrize("tile", BLOCK_TILES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 144), (20, 130, 272), (33, 50, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_product_with_scales_of_blocks_is_that_of_the_reference(tile, shape, dtype):
    m, n, k = shape
    a, b = integers(m, k), integers(n, k, seed=1)
    if dtype == FP8:
        a, b = make(m, k).to(FP8), make(n, k, seed=1).to(FP8)
    scales = blocks(m, n, k)
    want = wanted(a, b, *scales, make(n), out=torch.float32)
    got = product(a, b, *scales, make(n), tile=tile, out=torch.float32)
    # Float32 sums of K / 128 terms, any of which may be as large as the largest result.
    torch.testing.assert_close(got, want, rtol=0, atol=2**-21 * want.abs().max().item())


# Each of these with each of the others.
PAIRS = [
    (0, 1, None, None),
    (0, 8, "gelu_tanh", torch.float16),
    (1, 8, None, torch.float16),
    (1, 1, "gelu_tanh", None),
    (2, 1, "gelu_tanh", torch.float16),
    (2, 8, None, None),
    (18, 8, "gelu_tanh", None),
    (18, 1, None, torch.float16),
]


@pytest.mark.parametrize(("gates", "parts", "activation", "kept"), PAIRS)
def test_what_follows_the_sums_is_that_of_the_reference(
    gates, parts, activation, kept, monkeypatch
):
    """However many parts a tile is cut into; gate and residual lie apart, and stay as they are."""
    monkeypatch.setattr(mm_triton, "parts", lambda *_: parts)
    m, n, k = 18, 40, 32
    a, b = integers(m, k), integers(n, k, seed=1)
    scales = (make(m, 1).abs() * 1e-3, make(n, 1, seed=1).abs() * 1e-1)
    gate = make(gates, 2 * n, seed=3)[:, n:] if gates else None
    residual = None if kept is None else make(m, n + 8, seed=4).to(kept)[:, 3 : n + 3]
    before = None if kept is None else residual.clone()
    operands = (a, b, *scales, make(n, seed=2), None, None, activation, gate, residual)
    tile = Tile(16, 32, 32)
    want = wanted(*operands, out=torch.float32)
    torch.testing.assert_close(product(*operands, tile=tile, out=torch.float32), want)
    assert kept is None or torch.equal(residual, before)


# The last of the tiles flattens its loops, and has room for some ranks as a whole.
@pytest.mark.parametrize(
    ("rank", "out"),
    [
        (1, torch.float16),
        (16, torch.float32),
        (40, torch.float16),
        (64, torch.float16),
        (96, torch.float32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_low_rank_term_is_that_of_the_reference(rank, out, dtype):
    """Before the bias and the activation; h lies apart, as a part of what layers share."""
    m, n, k = 37, 50, 96
    a, b = integers(m, k), integers(n, k, seed=1)
    if dtype == FP8:
        a, b = (x.float().div(64).to(FP8) for x in (a, b))
    scales = (make(m, 1).abs() * 1e-3, make(n, 1, seed=1).abs() * 1e-2)
    h = make(m, rank + 24, seed=3, dtype=torch.float16)[:, 8 : rank + 8]
    low_rank = h, make(n, rank, seed=4, dtype=torch.float16)
    rest = (make(n, seed=2), None, None, "gelu_tanh", None, None)
    want = mm_reference.run(a, b, *scales, *rest, out, low_rank)
    for tile in (*TILES, Tile(32, 16, 64, tma=True, flatten=True)):
        got = product(a, b, *scales, *rest, low_rank, tile=tile, out=out)
        # Float32 sums of the rank in another order.
        torch.testing.assert_close(
            got, want, rtol=2e-3 if out == torch.float16 else 1e-4, atol=1e-4
        )


def test_gelu_is_that_of_float64_and_hides_nothing():
    """The sums are 1, so that what is put in is the scale of a row."""
    x = torch.cat((torch.linspace(-13, 13, 400), torch.tensor([1e4, 1e20, -1e20, 0.0, 1e-30])))
    x = torch.cat((x, torch.tensor([torch.nan, torch.inf, -torch.inf]))).reshape(-1, 1)
    a, b = torch.zeros(len(x), 16, dtype=torch.int8), torch.ones(1, 16, dtype=torch.int8)
    a[:, 0] = 1
    rest = (None, None, None, "gelu_tanh")
    got = product(a, b, x, torch.ones(1), *rest, tile=Tile(64, 16, 16), out=torch.float32)
    want = torch.nn.functional.gelu(x.double(), approximate="tanh").float()
    # 1 + tanh in float64 has no digits left below.
    normal = ~(x < -5)
    # exp2 of up to 24, itself rounded to 2^-24 of that, three times over.
    torch.testing.assert_close(got[normal], want[normal], rtol=5e-6, atol=0, equal_nan=True)
    tail = torch.isfinite(x) & (x < -5)
    assert (got[tail].abs() < 3e-7).all() and (got[tail] <= 0).all()
    assert torch.isnan(got[-1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_row_and_no_other(bad):
    a, b = integers(20, 256), integers(9, 256, seed=1)
    scale_a, scale_b = blocks(20, 9, 256)
    clean = product(a, b, scale_a, scale_b, tile=BLOCK_TILES[0], out=torch.float32)
    scale_a[7, 1] = bad
    got = product(a, b, scale_a, scale_b, tile=BLOCK_TILES[0], out=torch.float32)
    assert not torch.isfinite(got[7]).any()
    got[7] = clean[7]
    assert torch.equal(got, clean)


@pytest.mark.parametrize(
    ("k", "rotate", "source"),
    [
        *((256, True, source) for source in (torch.float16, torch.float32)),
        *((16, False, source) for source in (torch.float16, torch.float32)),
        (1792, True, torch.float16),
        (1000, False, torch.float32),
    ],
)
def test_int8_rows_are_those_of_the_reference(k, rotate, source):
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


@pytest.mark.parametrize("k", [128, 384, 1280])
def test_interleaved_codes_are_those_in_order_moved(k):
    x = make(3, k)
    stored, scale = rows_triton.run(x, FP8, False)
    got, same = rows_triton.run(x, FP8, False, NOTHING, None, True)
    assert torch.equal(got.view(torch.uint8), interleave(stored).view(torch.uint8))
    assert torch.equal(same, scale)


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
