"""Tuning of attention from tokens to what `auto` takes: our references in place of the kernels."""

import dataclasses
import json

import pytest
import torch

from lowbit.ops import registry, tuning, tuning_file
from lowbit.ops.attention import auto, router, ways
from lowbit.ops.attention.table import MAX_ERROR
from lowbit.ops.registry import Backend, Needs
from lowbit.quant import tune as tuning_of_all
from lowbit.quant.tune import Attention, attention, problems, tune
from tests.quant.tune.bench import GPU, bench

SIZES = [Attention(256, 64), Attention(128, 128)]
# Fractions of torch's time.
TIMES = {"sdpa": 1.0, "lowbit_exact": 0.9, "lowbit_int8": 0.99, "lowbit_fp8": 0.5, "fast": 0.25}
OURS = ("lowbit_exact", "lowbit_int8", "lowbit_fp8")


@pytest.fixture(autouse=True)
def few_heads(monkeypatch, cache):
    monkeypatch.setattr(attention, "HEADS_MIN", 2)
    monkeypatch.setattr(attention, "HEADS_MAX", 2)


@pytest.fixture
def fast(monkeypatch):
    """Return a function that adds a way `fast` that runs `compute(q, k, v)`."""

    def add(compute, package: str | None = None) -> None:
        found = {**registry._BACKENDS, ways.OP: list(registry.backends(ways.OP))}
        monkeypatch.setattr(registry, "_BACKENDS", found)
        needs = Needs(frozenset({"bfloat16", "bfloat16_masked"}), package=package)
        run = lambda q, k, v, mask, causal, scale: compute(q, k, v, mask)  # noqa: E731
        registry.register(Backend(ways.OP, "fast", 99, needs, run))
        monkeypatch.setattr(router, "NAMES", (*router.NAMES, "fast"))
        tuning.forget()

    return add


def plain(q, k, v, mask):
    return ways.sdpa(q, k, v, mask, False, None)


def measure(ways=OURS, sizes=SIZES, ms=TIMES.get, **given):
    able = dict.fromkeys(ways)
    return tune(sizes, dataclasses.replace(bench(ms=ms, schemes=()), ways=able), **given)


def chosen(length: int, keys: int, masked: bool = False, **options) -> str:
    q, k = (torch.zeros(1, 1, n, 128, dtype=torch.bfloat16) for n in (length, keys))
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool) if masked else None
    return router.choose(q, k, k, "auto", mask, **options)


def test_what_beats_torchs_own_is_stored_by_speed_and_taken(cache):
    report = measure()
    assert [(r.op, r.scheme, r.m, r.rows, r.n, r.k) for r in report.results] == [
        ("attention", scheme, p.tokens, p.queries, p.keys, 128)
        for p in SIZES
        for scheme in ("unmasked", "keys")
    ]
    for result in report.results:
        assert result.ranking == ("lowbit_fp8", "lowbit_exact")
        assert (result.winner, result.default, result.gain) == ("lowbit_fp8", "sdpa", 1.0)
        assert result.times_ms == {n: TIMES[n] for n in ("sdpa", *OURS)}
        assert not result.wrong and not result.failed and result.tried == 4
        assert all(0 < error <= MAX_ERROR for error in result.errors.values())
    entry = tuning.lookup("attention", GPU)["keys", 64, 128, 64]
    assert auto.from_choice(entry.choice) == (
        auto.Ranked("lowbit_fp8", 0.5, None),
        auto.Ranked("lowbit_exact", 0.9, None),
    )
    assert (entry.ms, entry.instead_of, entry.instead_ms) == (0.5, "sdpa", 1.0)
    assert len(tuning_file.read(tuning_file.path())[0].entries) == 4
    assert chosen(64, 64) == chosen(9999, 100, masked=True) == "lowbit_fp8"
    assert chosen(63, 63) == "sdpa"


def test_what_is_stored_is_read_again(cache):
    measure()
    tuning._used.clear()
    tuning.forget()
    assert chosen(500, 200) == "lowbit_fp8" and chosen(500, 200, bits_min=16) == "sdpa"


def test_where_nothing_is_faster_that_is_stored_too(cache):
    measure(ms=lambda name: 1.0)
    entry = tuning.lookup("attention", GPU)["unmasked", 64, 128, 64]
    assert (entry.choice, entry.ms, entry.instead_ms) == ([], 1.0, 1.0)
    assert chosen(64, 64) == "sdpa"
    assert auto.starts(torch.device("cpu"), 128, None)[0] == auto.Start(64, "sdpa", auto.TUNED)


def test_new_measurements_take_the_place_of_older_ones(cache):
    measure()
    measure(ms={**TIMES, "lowbit_fp8": 2.0}.get)
    assert chosen(64, 64) == "lowbit_exact"
    measure(ways=(), sizes=SIZES[:1])
    assert chosen(64, 64) == "sdpa" and chosen(128, 128) == "lowbit_exact"


def test_dry_run_writes_nothing(cache):
    report = measure(store=False)
    assert report.results[0].winner and not list(cache.iterdir())


def test_package_is_stored_with_its_version_and_its_loss_goes_down_the_list(
    cache, fast, monkeypatch
):
    fast(plain, package="torch")
    measure(ways=(*OURS, "fast"))
    ranking = tuning.lookup("attention", GPU)["unmasked", 64, 128, 64].choice
    assert ranking[0] == {"way": "fast", "ms": 0.25, "version": tuning.version(["torch"])}
    assert ranking[1]["version"] is None
    assert chosen(64, 64) == "fast"
    monkeypatch.setattr(registry, "_has_package", lambda name: name != "torch")
    tuning.forget()
    assert chosen(64, 64) == "lowbit_fp8"


def noisy(error: float):
    """Return attention whose values err by a part of themselves."""

    def compute(q, k, v, mask):
        out = plain(q.float(), k.float(), v.float(), mask)
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return (out + noise * error * out.norm() / noise.norm()).to(q.dtype)

    return compute


def test_way_that_errs_too_much_is_left_out_and_said_so(fast):
    fast(noisy(0.06))
    report = measure(ways=(*OURS, "fast"))
    for result in report.results:
        assert "errs by 0.0" in result.failed["fast"] and str(MAX_ERROR) in result.failed["fast"]
        assert result.ranking[0] == "lowbit_fp8" and not result.wrong
        assert 0.05 < result.errors["fast"] < 0.07
    assert chosen(64, 64) == "lowbit_fp8"


def test_way_that_errs_as_sageattention_does_is_taken(fast):
    fast(noisy(0.042))
    measure(ways=("fast",))
    assert chosen(64, 64) == "fast"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_value_that_is_not_finite_is_enough(fast, value):
    def broken(q, k, v, mask):
        out = plain(q, k, v, mask)
        # A row that is not among those that are compared.
        out[0, 1, 1, 7] = value
        return out

    fast(broken)
    assert {r.failed["fast"] for r in measure(ways=("fast",)).results} == {"gives NaN or infinity"}
    assert chosen(64, 64) == "sdpa"


def test_a_kernel_of_ours_that_errs_is_wrong(monkeypatch):
    whole = ways.attention

    def broken(q, k, v, mode, **options):
        return whole(q, k, v, mode, **options) * (0.9 if mode == "fp8" else 1)

    monkeypatch.setattr(ways, "attention", broken)
    report = measure()
    assert {r.wrong for r in report.results} == {("lowbit_fp8",)}
    assert chosen(64, 64) == "lowbit_exact"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA error: no kernel image"), "CUDA error: no kernel image"),
        (AssertionError("head size"), "head size"),
        (TypeError(), "TypeError"),
        (OSError("no compiler"), "no compiler"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
    ],
    ids=str,
)
def test_way_that_raises_is_left_out_and_said_so(fast, error, reason):
    def failing(q, k, v, mask):
        raise error

    fast(failing)
    for result in measure(ways=(*OURS, "fast")).results:
        assert result.failed == {"fast": reason} and result.winner == "lowbit_fp8"


def test_way_that_fails_when_it_is_timed_ends_its_size_alone(fast):
    calls = []

    def failing(q, k, v, mask):
        calls.append(k.shape[2])
        if calls.count(64) == 2 and k.shape[2] == 64:
            raise RuntimeError("now and then")
        return plain(q, k, v, mask)

    fast(failing)
    results = measure(ways=("fast",)).results
    assert [r.note for r in results] == ["fast: now and then", "", "", ""]
    assert chosen(64, 64) == "sdpa" and chosen(128, 128) == "fast"


def test_too_little_memory_for_the_tensors_skips_a_size(monkeypatch):
    def full(scheme, problem, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "Contest", full)
    assert {r.note for r in measure().results} == {"not enough memory"}
    assert not tuning_file.path().exists()


def test_ways_that_are_far_slower_are_not_tried_with_more_tokens():
    times = {**TIMES, "lowbit_int8": 1.1}
    slow = measure(ms={name: 10 * ms for name, ms in times.items()}.get)
    assert [sorted(r.times_ms) for r in slow.results[2:]] == [
        ["lowbit_exact", "lowbit_fp8", "sdpa"]
    ] * 2
    quick = measure(ms=times.get)
    assert all(len(r.times_ms) == 4 for r in quick.results)


def test_way_that_takes_no_mask_is_measured_without_one(monkeypatch):
    plain_refusal = router.refusal

    def refusal(way, q, k, v, mask=None, causal=False):
        takes = mask is None or way != "lowbit_fp8"
        return plain_refusal(way, q, k, v, mask, causal) if takes else "no mask"

    monkeypatch.setattr(router, "refusal", refusal)
    assert [r.winner for r in measure().results] == ["lowbit_fp8", "lowbit_exact"] * 2


def test_time_that_runs_out_stores_what_won_and_leaves_the_rest(cache):
    now = iter(range(0, 10_000, 25))
    report = measure(max_seconds=100, clock=lambda: next(now))
    assert report.results[0].untried and report.unreached
    none = iter(range(0, 10_000, 60))
    late = measure(ways=(), ms=lambda name: 1.0, max_seconds=50, clock=lambda: next(none))
    assert (len(late.results), late.unreached) == (0, 4)


def test_time_that_runs_out_leaves_what_was_measured_whole(cache):
    measure()
    now = iter(range(0, 10_000, 25))
    cut = measure(ms={**TIMES, "lowbit_exact": 0.7}.get, max_seconds=100, clock=lambda: next(now))
    first = cut.results[0]
    assert first.ranking and first.untried
    entry = tuning.lookup("attention", GPU)[first.scheme, first.n, first.k, first.m]
    assert [ranked.ms for ranked in auto.from_choice(entry.choice)] == [0.5, 0.9]


def test_linear_layers_have_half_of_the_time(cache, monkeypatch):
    done = []
    monkeypatch.setattr(tuning_of_all, "_step", lambda op, *rest: done.append(op))
    now = iter(range(0, 10**6, 20))
    able = dataclasses.replace(bench(ms=TIMES.get), ways=dict.fromkeys(OURS))
    layers = [problems.Problem(16, 64, 256)]
    report = tune([*SIZES, *layers], able, max_seconds=400, clock=lambda: next(now))
    assert report.unreached and len(done) == 2


def test_linear_layers_get_all_the_time_that_attention_leaves(cache):
    seen = []
    measure(progress=lambda *done: seen.append(done))
    assert seen == [(4, 16), (8, 16), (12, 16), (16, 16)]


def test_ways_that_cannot_run_are_told_once():
    able = {"lowbit_fp8": None, "sageattn": "sageattn: package sageattention is missing"}
    report = tune(SIZES, dataclasses.replace(bench(ms=TIMES.get, schemes=()), ways=able))
    assert report.absent == {"sageattn": "sageattn: package sageattention is missing"}
    assert "sageattn" not in report.results[0].times_ms
    assert tune([], dataclasses.replace(bench(schemes=()), ways=able)).absent == {}


def test_ways_of_4_bits_and_torchs_own_are_no_candidates():
    able = attention.able(torch.device("cpu"))
    assert not able.keys() & {"auto", "sdpa", "lowbit_fp4", "sageattn3_fp4"}
    assert {name for name, reason in able.items() if reason is None} == set(OURS)
    assert {"cudnn", "flash", "kitchen_int8", "sageattn"} <= able.keys()


def test_texts_are_keys_of_many_queries_and_the_rest_attends_to_itself():
    assert problems.of_attention() == [
        *(Attention(8192, 512), Attention(8192, 1024)),
        *(Attention(n, n) for n in (2048, 4096, 8192, 16384, 32768)),
    ]
    assert problems.of_attention((4096, 77, 4096)) == [Attention(8192, 77), Attention(4096, 4096)]
    with pytest.raises(ValueError, match="1 to 131072 tokens can be tuned"):
        problems.of_attention((0,))


def test_heads_fill_a_gpu_and_are_as_many_as_models_have(monkeypatch):
    monkeypatch.undo()
    heads = [attention.heads_of(problem.queries) for problem in problems.of_attention()]
    assert heads == [16, 16, 24, 24, 16, 8, 8]
    # 8 GiB suffice for all; with half a GiB long ones have fewer heads, and one at least.
    for free, longest in ((8 << 30, 8), (1 << 29, 4), (1 << 20, 1)):
        assert attention.heads_of(32768, free) == longest


def test_expected_is_attention_in_float64_with_and_without_the_mask():
    for scheme, masked in (("unmasked", False), ("keys", True)):
        contest = attention.Contest(scheme, Attention(128, 200), torch.device("cpu"))
        q, k, v = (x.double() for x in (contest._q, contest._k, contest._v))
        want = ways.sdpa(q, k, v, contest._mask, False, None)
        want = want[0, contest._heads][:, contest._rows]
        torch.testing.assert_close(contest._expected, want)
        assert (contest._mask is not None) == masked
        assert contest._q.stride(1) < contest._q.stride(2)


def test_file_is_json_that_any_layout_before_reads(cache):
    measure()
    content = json.loads(tuning_file.path().read_text())
    (section,) = content["sections"]
    assert content["schema"] == 1 and section["for"]["op"] == "attention"
    assert set(section["for"]) >= {"gpu", "torch", "triton", "source", "capability"}
