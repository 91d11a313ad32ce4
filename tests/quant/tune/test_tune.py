"""Tuning from problems to the file, the reference in the kernels' place, times made up."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowbit.ops import registry, tuning, tuning_file
from lowbit.ops.launch import TRITON_MIN
from lowbit.ops.linear import linear
from lowbit.ops.scaled_mm.tiles import Tile, from_choice
from lowbit.quant import formats
from lowbit.quant import tune as module
from lowbit.quant.tune import PLAIN, Problem, gpu_bench, products, tune
from lowbit.quant.tune.contest import CannotRunError
from lowbit.quant.tune.products import Layer, Product
from tests.quant.tune.bench import GPU, bench, by_reference, made_up_ms, taken

pytest.importorskip("triton", reason="Triton, whose errors tuning knows, is missing")

PROBLEM = Problem(20, 48, 64)
OF_AMPERE = {"cudnn", "flash", "sageattn", "lowbit_exact", "lowbit_int8"}
INT8, FOUR = {"int8_row", "int8_row_convrot"}, {"nvfp4", "mxfp4"}


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(products, "run_tile", by_reference)


@pytest.fixture
def product(kernel):
    return Product("int8", 40, 48, 64, GPU, torch.device("cpu"))


def weight_of(name: str):
    return formats.get(name).quantize(
        torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    )


def test_winner_is_stored_and_taken(cache, kernel):
    report = tune([PROBLEM], bench())
    assert [(r.scheme, r.m, r.rows, r.n, r.k) for r in report.results] == [
        (scheme, 32, *dataclasses.astuple(PROBLEM)) for scheme in ("int8", "fp8")
    ]
    for result in report.results:
        assert result.winner and result.gain > 0.02 and not result.failed and not result.wrong
        assert result.times_ms[result.winner] == min(result.times_ms.values())
        entry = tuning.lookup("scaled_mm", GPU)[result.scheme, 48, 64, 32]
        tile = taken(result.scheme, 20, 48, 64)
        assert from_choice(entry.choice) == tile
        assert entry.ms == made_up_ms(tile) < entry.instead_ms
        assert tile != taken(result.scheme, 20, 48, 64, None)
    assert Path(report.path) == cache / tuning_file.FILE
    assert len(tuning_file.read(Path(report.path))[0].entries) == 2


def test_where_the_built_in_tile_is_the_fastest_nothing_is_stored(cache, kernel):
    default = dataclasses.replace(taken("int8", 20, 48, 64, None), rate=1.0)
    report = tune(
        [PROBLEM], bench(ms=lambda name: 1 if name == default else 1.01, schemes=["int8"])
    )
    assert report.results[0].winner is None and report.results[0].tried > 10
    assert not tuning_file.path().exists()


def test_an_entry_that_no_longer_wins_goes(cache, kernel):
    tune([PROBLEM], bench(schemes=["int8"]))
    assert tuning.lookup("scaled_mm", GPU)
    tune([PROBLEM], bench(ms=lambda name: 1, schemes=["int8"]))
    assert not tuning.lookup("scaled_mm", GPU)
    assert not any(part.entries for part in tuning_file.read(tuning_file.path()))


def test_dry_run_writes_nothing(cache, kernel):
    report = tune([PROBLEM], bench(), store=False)
    assert report.results[0].winner and not report.stored
    assert not list(cache.iterdir())


def test_wrong_tile_is_reported_and_never_stored(cache, monkeypatch):
    """One that forgets the last row, and is the fastest."""

    def sabotaged(*, out, tile, **others):
        by_reference(out=out, tile=tile, **others)
        if tile.stages == 5:
            out[-1] = 0

    monkeypatch.setattr(products, "run_tile", sabotaged)
    (result,) = tune([PROBLEM], bench(schemes=["int8"])).results
    assert result.wrong and all("s5" in name for name in result.wrong)
    assert taken("int8", 20, 48, 64).stages != 5


def test_tile_that_does_not_compile_is_counted(cache, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def limited(*, tile, **others):
        if tile.stages == 5:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if tile.warps == 4 and tile.stages == 4:
            raise RuntimeError("PassManager::run failed\nmore")
        by_reference(tile=tile, **others)

    monkeypatch.setattr(products, "run_tile", limited)
    (result,) = tune([PROBLEM], bench(schemes=["int8"])).results
    reasons = set(result.failed.values())
    assert any("shared memory, Required: 300000" in reason for reason in reasons)
    assert "PassManager::run failed" in reasons
    assert taken("int8", 20, 48, 64).stages == 3


def test_too_little_memory_skips_a_step_and_not_the_rest(cache, monkeypatch):
    def full(*, a, **others):
        if a.dtype == torch.int8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        by_reference(a=a, **others)

    monkeypatch.setattr(products, "run_tile", full)
    int8, fp8 = tune([PROBLEM], bench()).results
    assert int8.note == "not enough memory" and int8.winner is None
    assert fp8.winner and not fp8.note


def test_time_is_shared_and_what_it_does_not_suffice_for_is_counted(cache, kernel):
    now = iter(range(10_000))
    problems = [PROBLEM, Problem(20, 64, 64), Problem(20, 80, 64)]
    report = tune(problems, bench(schemes=["int8"]), max_seconds=20, clock=lambda: next(now))
    assert len(report.results) + report.unreached == 3
    assert report.results[0].untried > 0 and report.results[0].tried > 0
    assert report.seconds >= 20
    now = iter(range(0, 10_000, 30))
    late = tune(problems, bench(schemes=["int8"]), max_seconds=20, clock=lambda: next(now))
    assert (len(late.results), late.unreached) == (0, 3)


def test_progress_counts_products_for_more_than_layers(cache, kernel):
    seen = []
    problem = Problem(20, 48, 256)
    tune([problem], bench(formats=["int8"]), progress=lambda *done: seen.append(done))
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_exact_product_is_that_of_integers(product):
    x = product._exact
    total = x["a"].double() @ x["b"].double().t()
    # What FP8 accumulators hold exactly.
    assert total.abs().max() < 2**13
    want = total * x["scale_a"] * x["scale_b"].t() + x["bias"].double()
    assert torch.equal(product._product, want.to(products.OUT))
    # The sum has room to be rounded as one with the product: float32 holds it as it is.
    assert torch.equal(want.float().double(), want)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_every_error_of_a_product_shows(kernel, monkeypatch, scheme):
    contest = Product(scheme, 40, 48, 64, GPU, torch.device("cpu"))
    tile = Tile(16, 32, 32)
    assert contest.right(tile, 40) and contest.right(tile, 7)

    def with_fault(fault):
        def run(*, out, **others):
            by_reference(out=out, **others)
            fault(out)

        monkeypatch.setattr(products, "run_tile", run)
        return contest.right(tile, 40)

    assert not with_fault(lambda out: out[:, -1:].zero_())
    assert not with_fault(lambda out: out[3].copy_(out[4].clone()))
    assert not with_fault(lambda out: out[39, 47].add_(0.25))
    assert not with_fault(lambda out: out[0, 0].fill_(torch.nan))
    assert with_fault(lambda out: None)


def test_result_that_is_not_written_is_wrong(product, monkeypatch):
    monkeypatch.setattr(products, "run_tile", lambda **arguments: None)
    assert not product.right(Tile(16, 32, 32), 40)


def test_winner_is_asked_for_zero_points_and_for_float32(product, monkeypatch):
    tile = Tile(16, 32, 32)
    assert product.right(tile, 40) and product.serves(tile)

    def forgets(*, zero_point, column_sum, **others):
        by_reference(zero_point=None, column_sum=None, **others)

    monkeypatch.setattr(products, "run_tile", forgets)
    assert product.right(tile, 40) and not product.serves(tile)

    def rounds(*, out, **others):
        narrow = torch.empty_like(out, dtype=torch.bfloat16)
        by_reference(out=narrow, **others)
        out.copy_(narrow)

    monkeypatch.setattr(products, "run_tile", rounds)
    # Sums that bfloat16 does not hold.
    product._exact["bias"].fill_(0.375).add_(256)
    assert not product.serves(tile)
    # Too large for a float32 result: not asked.
    assert Product.serves(product, Tile(256, 128, 64))


def test_auto_takes_what_was_faster_for_the_layer(cache, caplog):
    """The made-up times have `reference` beat comfy-kitchen for `int8`; for FP8 it is alone."""
    problem = Problem(20, 48, 256)
    report = tune([problem], bench(schemes=(), formats=("int8", "fp8_e4m3")))
    int8, fp8 = report.results
    assert (int8.op, int8.scheme, int8.winner, int8.default) == (
        *("linear", "int8_row", "reference", "kitchen"),
    )
    assert int8.gain == pytest.approx(1) and int8.times_ms[PLAIN] == 0.25
    assert (fp8.scheme, fp8.winner, fp8.default) == ("fp8_tensor", None, "reference")
    weight, x = weight_of("int8"), torch.randn(30, 256)
    with caplog.at_level("INFO", logger="lowbit.ops.registry"):
        for _ in range(3):
            assert torch.equal(linear(x, weight), linear(x, weight, backend="reference"))
    told = [r.getMessage() for r in caplog.records if "faster" in r.getMessage()]
    assert told == [
        "linear int8_row [48, 256], M up to 32, on cpu: reference, measured faster than kitchen"
    ]
    many = torch.randn(33, 256)
    assert torch.equal(linear(many, weight), linear(many, weight, backend="kitchen"))


def test_backend_that_errs_cannot_win(cache, monkeypatch):
    def broken(x, weight, bias):
        return torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype)

    found = {"linear": list(registry.backends("linear"))}
    monkeypatch.setattr(registry, "_BACKENDS", found)
    wants = registry.Needs(frozenset({"int8_row"}))
    registry.register(registry.Backend("linear", "broken", 50, wants, broken))
    tuning.forget()
    times = {"broken": 0.1, "kitchen": 1, "reference": 2, PLAIN: 1}
    (result,) = tune(
        [Problem(20, 48, 256)], bench(ms=times.get, schemes=(), formats=["int8"])
    ).results
    assert (result.wrong, result.winner) == (("broken",), None)


def test_backend_that_fails_is_a_candidate_that_cannot_run(monkeypatch):
    contest = Layer(formats.get("int8"), 20, 48, 256, torch.device("cpu"))

    def fail(*args):
        raise RuntimeError("cublas says no")

    monkeypatch.setattr(products, "linear", fail)
    with pytest.raises(CannotRunError, match="cublas says no"):
        contest.right("kitchen", 20)


@pytest.fixture
def pretend(monkeypatch):
    """Return a function that pretends one GPU of some capability, with all packages."""

    def gpu(*capability: int) -> None:
        properties = SimpleNamespace(
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=99 << 10,
            shared_memory_per_multiprocessor=100 << 10,
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(registry, "capability", lambda device: capability)
        monkeypatch.setattr(registry, "_has_package", lambda name: True)
        monkeypatch.setattr(registry, "_version", lambda name: TRITON_MIN)
        monkeypatch.setattr(registry, "_self_test", lambda test, device: None)
        monkeypatch.setattr(tuning, "gpu", lambda device: GPU)
        monkeypatch.setattr(module, "GpuTimer", lambda device: None)
        tuning.forget()

    yield gpu
    monkeypatch.undo()
    tuning.forget()


@pytest.mark.parametrize(
    ("capability", "schemes", "layers", "ways"),
    [
        ((7, 5), (), INT8, {"kitchen_int8"}),
        ((8, 6), ("int8",), INT8 | FOUR, {"kitchen_int8", *OF_AMPERE}),
        (
            *((9, 0), ("int8", "fp8"), INT8 | FOUR | {"fp8_tensor", "fp8_row"}),
            {"kitchen_int8", "lowbit_fp8", *OF_AMPERE},
        ),
    ],
)
def test_a_gpu_measures_what_it_can_run_and_what_it_has_a_choice_of(
    pretend, capability, schemes, layers, ways
):
    pretend(*capability)
    found = gpu_bench()
    assert found.schemes == schemes
    assert found.four_bit == (("nvfp4_16", "mxfp4_16") if schemes else ())
    names = [formats.get(name).layout.scheme for name in found.formats]
    assert set(names) == layers and len(names) == len(layers)
    assert found.limits.program_bytes == 99 << 10
    assert {way for way, reason in found.ways.items() if reason is None} == ways
    assert all(way in reason for way, reason in found.ways.items() if reason)


def test_gpu_that_is_not_there_is_named(pretend):
    pretend(9, 0)
    with pytest.raises(ValueError, match="no GPU 3; torch sees 1"):
        gpu_bench(3)


def test_layer_that_a_format_does_not_take_is_no_step(cache):
    report = tune([Problem(20, 48, 80)], bench(schemes=(), formats=["int8_convrot"]))
    assert report.results == () and report.unreached == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_there_is_no_bench():
    with pytest.raises(ValueError, match="torch sees no GPU"):
        gpu_bench()


def test_whole_search_runs_in_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when it starts."""
    tests = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
