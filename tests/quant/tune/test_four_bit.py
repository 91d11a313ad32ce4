"""Tuning of 4-bit products and layers, the reference in the kernels' place, times made up."""

import dataclasses

import pytest
import torch

from lowbit.ops import registry, tuning
from lowbit.ops.fp4_mm import OP, choice, fp4_mm
from lowbit.ops.fp4_mm.choice import Tile, candidates, default_tile, from_choice
from lowbit.ops.linear import linear
from lowbit.ops.linear.four_bit import FEW_ROWS
from lowbit.ops.scaled_mm import tiles
from lowbit.quant import formats
from lowbit.quant.tune import PLAIN, Problem, four_bit, tune
from lowbit.quant.tune.four_bit import GROUP_OF, FourBitProduct
from lowbit.quant.tune.products import Layer
from tests.quant.tune.bench import GPU, LIMITS, bench

pytest.importorskip("triton", reason="Triton, whose errors tuning knows, is missing")

PROBLEM = Problem(20, 48, 200)
CPU = torch.device("cpu")
HOPPER = (9, 0)


def by_reference(tile, x, packed, scale, tensor_scale, bias, n, group):
    """The product as `run_by` gives it, whatever the tile."""
    shape = (n, x.shape[1])
    return fp4_mm(x, packed, scale, tensor_scale, shape, group, bias, "reference")


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(four_bit, "run_by", by_reference)


@pytest.fixture(params=GROUP_OF)
def product(request, kernel):
    return FourBitProduct(request.param, 40, 48, 200, GPU, CPU)


def test_winner_is_stored_and_taken(cache, kernel):
    report = tune([PROBLEM], bench(schemes=(), four_bit=tuple(GROUP_OF)))
    assert [(r.op, r.scheme, r.m) for r in report.results] == [(OP, s, 32) for s in GROUP_OF]
    for result in report.results:
        assert result.winner and result.gain > 0.02 and not result.failed and not result.wrong
        entry = tuning.lookup(OP, GPU)[result.scheme, 48, 200, 32]
        group = GROUP_OF[result.scheme]
        tile = choice.choose(GPU, result.scheme, 20, 48, 200, group)
        assert from_choice(entry.choice) == tile and str(tile) == result.winner
        assert tile != default_tile(20, group, HOPPER)
        # Nor for other weights or more tokens.
        for m, n in ((20, 64), (33, 48)):
            untuned = choice.choose(GPU, result.scheme, m, n, 200, group)
            assert untuned == default_tile(m, group, HOPPER)


def test_decoded_weight_is_a_tile_of_another_kind(cache, kernel):
    report = tune([Problem(600, 48, 64)], bench(schemes=(), four_bit=("nvfp4_16",)))
    tile = choice.choose(GPU, "nvfp4_16", 600, 48, 64, 16)
    assert isinstance(tile, tiles.Tile) and str(tile) == report.results[0].winner


def test_wrong_tile_is_reported_and_never_stored(cache, monkeypatch):
    """One that forgets the last column, and is the fastest."""

    def sabotaged(tile, *given):
        out = by_reference(tile, *given)
        if getattr(tile, "splits", 0) == 16:
            out[:, -1] = 0
        return out

    monkeypatch.setattr(four_bit, "run_by", sabotaged)
    (result,) = tune([PROBLEM], bench(schemes=(), four_bit=("nvfp4_16",))).results
    assert result.wrong and all("k16" in name for name in result.wrong)
    assert choice.choose(GPU, "nvfp4_16", 20, 48, 200, 16).splits != 16


def test_exact_product_is_exact_whatever_the_order_of_its_sums(product):
    group = product._group
    weight = formats.get("nvfp4" if group == 16 else "mxfp4")
    assert weight.group == group
    x, packed, scale = product._exact, product._packed, product._scale
    plain = fp4_mm(x.float(), packed, scale, None, (48, 200), group, None, "reference").double()
    # Quarters: float32 holds 2^24 of them.
    assert torch.equal(plain * 4, (plain * 4).round())
    assert 200 * 12 * 4 < 2**24
    want = plain * 0.5 + product._bias.double()
    assert torch.equal(product._product, want.bfloat16())
    assert product._product.isfinite().all() and product._product.float().std() > 1


def test_every_error_of_a_product_shows(product, monkeypatch):
    tile = Tile(16, 64, 128)
    assert product.right(tile, 40) and product.right(tile, 7) and product.serves(tile)

    def with_fault(fault):
        def run(*given):
            out = by_reference(*given)
            fault(out)
            return out

        monkeypatch.setattr(four_bit, "run_by", run)
        return product.right(tile, 40)

    assert not with_fault(lambda out: out[:, -1:].zero_())
    assert not with_fault(lambda out: out[3].copy_(out[4].clone()))
    assert not with_fault(lambda out: out[0, 0].fill_(torch.nan))
    assert with_fault(lambda out: None)
    monkeypatch.setattr(four_bit, "run_by", lambda *g: by_reference(*g[:5], torch.ones(48), *g[6:]))
    assert not product.serves(tile)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("m", [1, 16, 64, 100, 128, 512, 8192])
def test_candidates_are_of_the_kinds_that_the_tokens_want_and_fit(group, m):
    found = candidates(HOPPER, LIMITS, m, group)
    assert len(set(found)) == len(found) > 10
    few = [tile for tile in found if isinstance(tile, Tile)]
    assert bool(few) == (m <= 128) and (len(few) == len(found)) == (m <= 64)
    assert all(tile.block_k >= 4 * group for tile in few)
    for tile in found:
        assert from_choice(choice.as_choice(tile)) == tile
    small = candidates((8, 6), dataclasses.replace(LIMITS, program_bytes=99 << 10), m, group)
    assert small and not any(getattr(tile, "tma", False) for tile in small)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        "w4a16",
        {"block_m": 16},
        {**dataclasses.asdict(Tile(16, 64, 128)), "block_m": 17},
        {**dataclasses.asdict(Tile(16, 64, 128)), "splits": 0},
        {**dataclasses.asdict(Tile(16, 64, 128)), "warps": "4"},
    ],
)
def test_entry_that_is_no_tile_is_ignored_and_said(cache, caplog, bad):
    with pytest.raises(ValueError, match="tile"):
        from_choice(bad)
    entry = tuning.Entry("nvfp4_16", 48, 200, 32, 20, bad, 1.0, None, None)
    tuning.use(OP, GPU, {entry.key: entry})
    assert choice.choose(GPU, "nvfp4_16", 20, 48, 200, 16) == default_tile(20, 16, HOPPER)
    assert "ignored" in caplog.text and "lowbit tune" in caplog.text


@pytest.fixture
def backends(monkeypatch):
    """Register more backends for NVFP4 layers: one that runs, one that wants to be named."""
    monkeypatch.setattr(registry, "_BACKENDS", {"linear": list(registry.backends("linear"))})
    run = next(b.run for b in registry.backends("linear") if b.name == "reference")
    for name, measured in (("quick", None), ("coarse", registry.BY_NAME)):
        needs = registry.Needs(frozenset({"nvfp4"}), measured=measured)
        registry.register(registry.Backend("linear", name, 101, needs, run))
    tuning.forget()
    yield
    tuning.forget()


def test_auto_takes_what_was_faster_for_a_4_bit_layer(cache, backends):
    times = {"reference": 1.0, "quick": 0.5, "coarse": 0.1, PLAIN: 2}
    problem = Problem(20, 48, 256)
    (result,) = tune([problem], bench(ms=times.get, schemes=(), formats=("nvfp4",))).results
    assert (result.scheme, result.winner, result.default) == ("nvfp4", "quick", "reference")
    # What errs more, and wants to be named, is none to be measured.
    assert set(result.times_ms) == {"quick", "reference", PLAIN}
    call = registry.Call("nvfp4", CPU, 48, 256, 32, True)
    assert registry.select("linear", call).name == "quick"
    assert registry.select("linear", call._replace(m=64)).name == "reference"
    weight = formats.get("nvfp4").quantize(torch.randn(48, 256))
    assert linear(torch.randn(20, 256), weight).shape == (20, 48)


def test_default_of_a_4_bit_layer_goes_by_the_tokens(monkeypatch):
    contest = Layer(formats.get("nvfp4"), 100, 48, 256, CPU)
    seen = []
    monkeypatch.setattr(
        registry,
        "select",
        lambda op, call, *rest: seen.append(call.few) or registry.backends(op)[0],
    )
    for rows in (FEW_ROWS, FEW_ROWS + 1):
        contest.default(rows)
    assert seen == [True, False]


def test_bench_of_so_many_bits_has_nothing_of_others():
    both = bench(formats=("int8", "nvfp4"), four_bit=("nvfp4_16",))
    four, eight = both.only(4), both.only(8)
    assert (four.schemes, four.formats, four.four_bit) == ((), ("nvfp4",), ("nvfp4_16",))
    assert (eight.schemes, eight.formats, eight.four_bit) == (both.schemes, ("int8",), ())
