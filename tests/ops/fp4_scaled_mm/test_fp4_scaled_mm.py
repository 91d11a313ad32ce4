"""The product of 8-bit activations and packed 4-bit weights: its contract, and its reference."""

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.decode_fp4 import decode_fp4_e4m3
from lowbit.ops.fp4_scaled_mm import fp4_scaled_mm, prefers_interleaved
from lowbit.ops.fp4_scaled_mm.tiles import MOST_TOKENS, TILES, Tile, choose
from lowbit.ops.linear.four_bit import GROUPS, four_bit
from lowbit.ops.quantize_rows import interleave, quantize_rows, restore
from lowbit.ops.scaled_mm import scaled_mm
from lowbit.quant import formats

CUDA = torch.device("cuda", 0)
E4M3 = torch.float8_e4m3fn
NAMES = [name for name in formats.names() if formats.get(name).layout.scheme in GROUPS]


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(name: str, n: int = 33, k: int = 256):
    """The arguments of a 4-bit weight: packed, scale, tensor scale, shape, group."""
    w = four_bit(formats.get(name).quantize(make(n, k, seed=1) * 0.02))
    return w.packed, w.scale, w.tensor_scale, w.shape, w.group


def test_interleaving_moves_columns_as_the_formula_says_and_back():
    x = torch.arange(2 * 256).reshape(2, 256)
    moved = interleave(x)
    for column in range(256):
        t, j, h, b = column % 128 // 32, column % 32 // 8, column % 8 // 4, column % 4
        place = column // 128 * 128 + 32 * j + 16 * h + 4 * t + (b ^ 1)
        assert torch.equal(moved[:, place], x[:, column])
    assert torch.equal(restore(moved), x)
    fp8 = make(3, 128).to(E4M3)
    assert torch.equal(restore(interleave(fp8)).view(torch.uint8), fp8.view(torch.uint8))
    with pytest.raises(ValueError, match="K=192 is not a multiple of 128"):
        interleave(make(1, 192))


def test_quantizer_interleaves_what_it_stores():
    x = make(5, 384)
    stored, scale = quantize_rows(x, E4M3)
    got, same = quantize_rows(x, E4M3, interleaved=True)
    assert torch.equal(restore(got).view(torch.uint8), stored.view(torch.uint8))
    assert torch.equal(same, scale)
    for dtype, rotate, k in ((torch.int8, False, 256), (E4M3, True, 256), (E4M3, False, 192)):
        with pytest.raises(ValueError, match="interleaved columns are for FP8"):
            quantize_rows(make(2, k), dtype, rotate, interleaved=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_product_is_that_of_the_decoded_weight(name, dtype, biased, static):
    given = weight_of(name)
    bias = make(33, seed=2).to(dtype) if biased else None
    x, scale = quantize_rows(make(7, 256), E4M3, interleaved=True)
    scale = torch.tensor([[0.01]]) if static else scale
    got = fp4_scaled_mm(x, scale, *given, bias, out_dtype=dtype)
    weight, rows = decode_fp4_e4m3(*given)
    want = scaled_mm(restore(x), weight, scale, rows, bias, out_dtype=dtype, backend="reference")
    assert got.dtype == dtype
    # Sums in float64 here, in float32 there.
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


def test_no_tokens_give_no_rows():
    x, scale = torch.empty(0, 256, dtype=E4M3), torch.empty(0, 1)
    assert fp4_scaled_mm(x, scale, *weight_of("nvfp4")).shape == (0, 33)


def test_what_does_not_fit_is_refused():
    given = weight_of("nvfp4")
    x, scale = quantize_rows(make(7, 256), E4M3, interleaved=True)
    for bad in (x[:, :128], x.view(torch.int8), x.t().contiguous().t()):
        with pytest.raises(ValueError, match=r"contiguous torch.float8_e4m3fn \[M, 256\]"):
            fp4_scaled_mm(bad, scale, *given)
    with pytest.raises(ValueError, match=r"x_scale is torch.float32 \[6, 1\]"):
        fp4_scaled_mm(x, scale[:6], *given)
    with pytest.raises(ValueError, match=r"bias is torch.float32 \[32\]; \[33\]"):
        fp4_scaled_mm(x, scale, *given, make(32))
    with pytest.raises(ValueError, match="x_scale is on meta, the weight on cpu"):
        fp4_scaled_mm(x, scale.to("meta"), *given)
    with pytest.raises(TypeError, match="out_dtype is torch"):
        fp4_scaled_mm(x, scale, *given, out_dtype=torch.int8)
    with pytest.raises(ValueError, match="interleaved, so of a multiple of 128"):
        fp4_scaled_mm(x[:, :192].contiguous(), scale, *weight_of("nvfp4", k=192))


def test_product_is_one_step_of_a_graph():
    given = weight_of("nvfp4")
    x, scale = quantize_rows(make(7, 256), E4M3, interleaved=True)

    def run(scale):
        return fp4_scaled_mm(x, scale * 2, *given) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scale), run(scale))


@pytest.fixture
def hopper(monkeypatch):
    """Pretend a Hopper GPU on which the kernel can be compiled."""
    monkeypatch.setattr(registry, "capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "_self_test", lambda test, device: None)
    registry.select.cache_clear()
    yield
    registry.select.cache_clear()


def test_few_tokens_are_interleaved_where_the_kernel_runs(hopper):
    for scheme in GROUPS:
        assert prefers_interleaved(scheme, CUDA, 5120, 5120, 512)
        assert not prefers_interleaved(scheme, CUDA, 5120, 5120, MOST_TOKENS + 1)
        # Not 16 bytes of a row, not whole stages.
        assert not prefers_interleaved(scheme, CUDA, 5124, 5120, 512)
        assert not prefers_interleaved(scheme, CUDA, 5120, 5184, 512)


def test_elsewhere_they_are_not():
    assert not prefers_interleaved("nvfp4", torch.device("cpu"), 5120, 5120, 512)


def test_tile_fills_the_multiprocessors():
    # Two waves of 128 x 128 would take as long as one of 128 x 256.
    tile = choose(132, 512, 5120, 5120)
    assert tile in TILES
    count = -(-512 // tile.tokens) * -(-5120 // tile.rows)
    assert 100 <= count <= 132


def test_two_warpgroups_take_turns_where_a_tile_has_64_rows_and_many_stages():
    assert choose(132, 512, 3072, 12288) == Tile(1, 256, turns=2)
    assert all(tile.groups == 1 == tile.parts for tile in TILES if tile.turns == 2)


def test_two_blocks_have_a_tile_where_tiles_are_few():
    tile = choose(132, 128, 3072, 3072)
    assert tile.parts == 2 and -(-128 // tile.tokens) * -(-3072 // tile.rows) <= 66
    assert choose(132, 1024, 13824, 5120).parts == 1
