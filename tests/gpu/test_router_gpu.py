"""The router on the GPU: every way that runs there, the guard, and whether `auto` chooses well."""

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.attention import auto, guard, router, ways
from lowbit.ops.attention.guard import EVERY_CALL, FIRST_CALL
from lowbit.ops.attention.modes import MODES
from lowbit.ops.attention.table import AUTO
from tests.bench import runner

WAYS = [name for name in router.NAMES if name != "auto"]
# What a way of so many bits errs by at most on normal data: the modes' own limit for 8 bits.
MAX_ERROR = {16: 0.01, 8: max(mode.max_error for mode in MODES.values()), 4: 0.25}
# SageAttention 1.0.6 errs by .042, 2.2.0 by .039.
OF_OTHERS = {"sageattn": 0.045}
HEADS, TOKENS = 8, 8192
# Some 10 ms, for which what runs on another stream does not wait.
SOME_CYCLES = 20_000_000
# A choice that is this much slower than torch's own is a wrong one, not noise.
SLOWER = 1.02


def inputs(h=4, kv=None, length=1000, keys=1100, d=128, dtype=torch.bfloat16):
    """q, k, v that lie in memory as projections give them, [B, L, H, D]."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((1, length, h, d), (1, keys, kv or h, d), (1, keys, kv or h, d))
    made = [torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes]
    return [x.transpose(1, 2) for x in made]


@pytest.fixture(autouse=True)
def forgetful():
    guard.forget()
    yield
    guard.forget()


@pytest.fixture(params=WAYS)
def way(request):
    reason = router.missing(request.param, torch.device("cuda", 0))
    if reason:
        pytest.skip(reason)
    return request.param


def runs(way: str, *tensors, **options) -> torch.Tensor:
    reason = router.refusal(way, *tensors, options.get("mask"))
    if reason:
        pytest.skip(reason)
    return router.route(*tensors, way, **options)


def max_error(way: str) -> float:
    return OF_OTHERS.get(way, MAX_ERROR[ways.bits(way)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [{}, {"kv": 2}, {"d": 64}, {"d": 96}, {"d": 256}, {"length": 1, "keys": 77}], ids=str
)
def test_way_is_near_float64_and_leaves_its_inputs(way, shape, dtype):
    q, k, v = inputs(**shape, dtype=dtype)
    before = [x.clone() for x in (q, k, v)]
    want = ways.sdpa(q.double(), k.double(), v.double(), None, False, 0.05)
    got = runs(way, q, k, v, scale=0.05, guard=FIRST_CALL)
    assert runner.relative_error(got, want) <= max_error(way)
    assert got.transpose(1, 2).is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_way_that_takes_masks_honours_them(way):
    q, k, v = inputs()
    mask = torch.ones(1, 1, 1, 1100, dtype=torch.bool, device="cuda")
    mask[..., 900:] = False
    want = ways.sdpa(q.double(), k.double(), v.double(), mask, False, None)
    got = runs(way, q, k, v, mask=mask, guard=FIRST_CALL)
    assert runner.relative_error(got, want) <= max_error(way)


@pytest.mark.parametrize("d", [64, 128])
def test_rotation_takes_the_outliers_out_or_is_refused(way, d):
    q, k, v = inputs(length=300, keys=4096, d=d)
    for x in (q, k):
        x[..., ::37] *= 5
    if not ways.prepares(way):
        with pytest.raises(ValueError, match="cannot rotate"):
            router.route(q, k, v, way, rotate=True)
        return
    want = ways.sdpa(q.double(), k.double(), v.double(), None, False, None)
    plain, rotated = (
        runner.relative_error(runs(way, q, k, v, rotate=r, guard=EVERY_CALL), want)
        for r in (False, True)
    )
    # FP8 keeps the error of its P·V.
    assert rotated <= (0.95 if way == "lowbit_fp8" else 0.8) * plain

    def run(q):
        return router.route(q * 2, k, v, way, rotate=True) + 1

    got = torch.compile(run, fullgraph=True)(q)
    assert runner.relative_error(got, run(q)) <= MAX_ERROR[16]


def test_auto_may_rotate_everything():
    """What it takes in 8 bits, and what in 16."""
    for tokens in (300, 5000):
        q, k, v = inputs(length=tokens, keys=tokens)
        want = ways.sdpa(q.double(), k.double(), v.double(), None, False, None)
        got = router.route(q, k, v, "auto", rotate=True)
        assert runner.relative_error(got, want) <= MAX_ERROR[8]


@pytest.mark.parametrize("d", [64, 128, 256])
def test_guard_finds_nothing_and_changes_nothing(way, d, caplog):
    tensors = inputs(h=HEADS, length=TOKENS, keys=TOKENS, d=d)
    plain = runs(way, *tensors)
    for checked in (FIRST_CALL, EVERY_CALL):
        assert torch.equal(runs(way, *tensors, guard=checked), plain)
    assert not caplog.records


def test_way_keeps_to_the_current_stream(way):
    """Its input comes late there, and its result is read late, when another has its memory."""
    q, k, v = inputs()
    want = runs(way, q, k, v)
    stream, x = torch.cuda.Stream(), torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SOME_CYCLES)
        x.copy_(q)
        got = router.route(x, k, v, way)
        torch.cuda._sleep(SOME_CYCLES)
        kept = got.clone()
        del got
    others = [torch.full_like(want, torch.nan) for _ in range(4)]
    stream.synchronize()
    assert torch.equal(kept, want) and all(x.isnan().all() for x in others)


def test_compiled_way_is_one_graph(way):
    q, k, v = inputs()

    def run(q):
        return router.route(q * 2, k, v, way, guard=EVERY_CALL) + 1

    want = run(q)
    got = torch.compile(run, fullgraph=True)(q)
    assert runner.relative_error(got, want) <= MAX_ERROR[16]


@pytest.mark.parametrize("way", ["cudnn", "flash", "lowbit_exact"])
def test_guard_lets_a_cuda_graph_be_recorded(way):
    q, k, v = inputs()
    want = router.route(q, k, v, way, guard=EVERY_CALL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = router.route(q, k, v, way, guard=EVERY_CALL)
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.parametrize("index", range(len(AUTO)))
@pytest.mark.parametrize("d", sorted({d for row in AUTO for d in row.head_sizes}))
def test_row_of_auto_is_not_slower_than_torchs_own_choice(index, d, idle_gpu):
    """And than the rows after it that take the same calls."""
    row, device = AUTO[index], torch.device("cuda", 0)
    if not auto.fits(row, device, d, None):
        pytest.skip(f"no row for {registry.capability(device)}, heads of {d}")
    tokens = max(row.tokens_min, TOKENS)
    tensors = inputs(h=24, length=tokens, keys=tokens, d=d)
    later = {r.way for i, r in enumerate(AUTO) if i > index and auto.fits(r, device, d, None)}
    names = [row.way, router.SDPA, *later]
    # Without pauses, as in sampling: power is part of what limits.
    timings = runner.measure_sustained({n: lambda n=n: router.route(*tensors, n) for n in names})
    times = {name: round(timing.median_ms, 3) for name, timing in timings.items()}
    print(d, times)
    assert all(times[row.way] <= SLOWER * time for time in times.values()), times


def test_guard_costs_little_after_the_first_call():
    tensors = inputs(h=24, length=TOKENS, keys=TOKENS)
    kinds = {checked: {"guard": checked} for checked in guard.GUARDS}
    timings = runner.measure(
        {n: lambda o=o: router.route(*tensors, "lowbit_exact", **o) for n, o in kinds.items()}
    )
    times = {name: timing.median_ms for name, timing in timings.items()}
    print(times)
    assert times[FIRST_CALL] <= SLOWER * times[guard.OFF]
