"""The pre-pass of attention in CUDA C++ against the Triton kernels that do the same."""

import dataclasses
import math
import threading

import pytest
import torch

from lowbit.ops import tuning
from lowbit.ops.attention import Prologue, attention, prepare, prepass
from lowbit.ops.attention.modes import MODES
from lowbit.ops.attention.prologue import NOTHING
from lowbit.ops.cuda import nvrtc
from lowbit.ops.layout import Layout, Swizzle, key_order
from tests.ops.attention.samples import sampled, unsampled

TILE = prepare.TILE
SCALE = 0.1


@pytest.fixture(autouse=True)
def _compiler():
    if nvrtc.missing():
        pytest.skip(nvrtc.missing())


def make(*shape: int, seed: int, dtype=torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def steps(name: str | None, h: int, kv: int, tokens: int, d: int, dtype=torch.float32) -> Prologue:
    if name is None:
        return NOTHING
    angle = 3 * make(tokens, d // 2, seed=9, dtype=torch.float32)
    angles = {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    if name == "rope":
        return Prologue(**angles)
    if name == "token":
        shapes = (h * d, kv * d)
    elif name == "head":
        shapes = (d, d)
    else:
        shapes = ((2, d), (2, d))
    sized = [shape if isinstance(shape, tuple) else (shape,) for shape in shapes]
    weights = [(1 + 0.2 * make(*shape, seed=n)).to(dtype) for n, shape in enumerate(sized)]
    norm = "token" if name == "token" else "head"
    return Prologue(norm, 1e-6, *weights, 77 if name == "split" else 0, **angles)


def both(monkeypatch, *given):
    """What the CUDA C++ gives, of memory that was NaN, and what the Triton kernels give."""
    with monkeypatch.context() as patch:
        patch.setattr(prepass, "fits", lambda *_, **__: False)
        tuning.forget()
        want = prepare.prepare(*given)
    tuning.forget()
    # Of both of the pools that memory comes from.
    sizes = (*[1 << 22] * 4, *[1 << n for n in range(8, 18)] * 8)
    poison = [torch.full((size,), torch.nan, device="cuda") for size in sizes]
    del poison
    assert prepass.fits(*given[:3], given[4], given[8], plain=not given[6])
    return prepare.prepare(*given), want


def near(got: torch.Tensor, want: torch.Tensor, most: float) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    assert error <= most, error


def values(ready, keys: int, swizzled: bool) -> torch.Tensor:
    """V as it is stored, in float64, [B · Hkv, Lk, D]."""
    v = ready.v.double() if ready.v.dtype == torch.int8 else ready.v.float().double()
    heads, blocks, d, _ = v.shape
    if swizzled:
        layout = Layout((d, TILE), (TILE, 1), Swizzle(3, 4, 3))
        places = torch.tensor([[layout(row, byte) for byte in range(TILE)] for row in range(d)])
        keys_of = (torch.arange(0, TILE, 16)[:, None] + torch.tensor(key_order())).flatten()
        plain = torch.empty_like(v)
        plain[..., keys_of.cuda()] = v.reshape(heads, blocks, -1)[..., places.cuda()]
        v = plain
    v = v.transpose(2, 3).reshape(heads, -1, d)[:, :keys]
    return v * ready.v_scale.double()[:, None] + ready.v_offset.double()[:, None]


SHAPES = {
    "some": {"b": 1, "h": 2, "kv": 2, "length": 300, "keys": 1000},
    "grouped": {"b": 2, "h": 4, "kv": 2, "length": 63, "keys": 129},
    "odd": {"b": 1, "h": 3, "kv": 3, "length": 129, "keys": 2},
    "wan": {"b": 1, "h": 40, "kv": 40, "length": 1000, "keys": 3000},
    "long": {"b": 1, "h": 5, "kv": 5, "length": 20000, "keys": 20001},
    "batch": {"b": 3, "h": 6, "kv": 3, "length": 257, "keys": 2500},
}


@pytest.mark.parametrize("first", ["tokens", "heads"])
@pytest.mark.parametrize(
    ("mode", "swizzled", "rotate", "d"),
    [
        ("exact", True, False, 128),
        ("fp8", True, True, 128),
        ("int8", True, False, 128),
        ("fp8", False, False, 128),
        ("int8", False, True, 64),
        ("fp8", False, False, 64),
    ],
)
@pytest.mark.parametrize("name", [None, "token", "head", "split", "rope"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_copies_are_those_of_the_triton_kernels(
    monkeypatch, shape, name, mode, swizzled, rotate, d, first
):
    b, h, kv, length, keys = SHAPES[shape].values()
    dtype = torch.float16 if rotate else torch.bfloat16

    def tensor(heads: int, tokens: int, seed: int) -> torch.Tensor:
        if first == "tokens":
            return make(b, tokens, heads, d, seed=seed, dtype=dtype).transpose(1, 2)
        return make(b, heads, tokens, d, seed=seed, dtype=dtype)

    q, k, v = tensor(h, length, 0), tensor(kv, keys, 1), tensor(kv, keys, 2)
    k += 2 * make(1, 1, 1, d, seed=3, dtype=dtype)
    v += 1
    angles = torch.bfloat16 if mode == "int8" else torch.float32
    p = steps(name, h, kv, max(length, keys), d, angles)
    given = (q, k, v, SCALE, MODES[mode], 4 if swizzled else 1, swizzled, True, p, rotate)
    got, want = both(monkeypatch, *given)
    # Sums in another order, and products rounded once instead of twice.
    compare(got, want)
    near(got.shift, want.shift, 1e-5)
    for field in ("q_bound", "k_bound"):
        near(getattr(got, field), getattr(want, field), 1e-3)
    assert (got.v is None) == (mode == "exact")
    if mode == "exact":
        return
    true = v.reshape(b * kv, keys, d).double()
    errors = [(values(ready, keys, swizzled) - true).norm() for ready in (got, want)]
    # What is taken off is a sample's, and the largest of a channel need not be a code.
    assert errors[0] <= 1.06 * errors[1]
    # The mean of each channel is kept.
    mean = values(got, keys, swizzled).mean(1) - true.mean(1)
    assert mean.abs().max() <= 1e-5


def compare(got, want) -> None:
    """What is stored of Q and K."""
    for field in ("q", "k"):
        codes, others = getattr(got, field).int(), getattr(want, field).int()
        assert (codes - others).abs().max() <= 1
        assert (codes != others).float().mean() <= 2e-3
    for field in ("q_scale", "k_scale"):
        near(getattr(got, field), getattr(want, field), 1e-5)


@pytest.mark.parametrize(
    "change",
    ["no k_weight", "no q_weight", "dtypes", "one split", "longer", "no angles", "angles differ"],
)
@pytest.mark.parametrize("name", ["token", "head"])
def test_parts_of_a_prologue(monkeypatch, name, change):
    h, length = 4, 700
    q, k, v = (make(1, length, h, 128, seed=n).transpose(1, 2) for n in range(3))
    p = steps(name, h, h, length, 128)
    rows = torch.stack((p.k_weight, 2 * p.k_weight))
    longer = [torch.cat((x, x)) for x in (p.cos, p.sin)]
    changed = {
        "no k_weight": {"k_weight": None},
        "no q_weight": {"q_weight": None},
        "dtypes": {"q_weight": p.q_weight.half(), "k_weight": p.k_weight.float()},
        "one split": {"k_weight": rows, "first": 130},
        "longer": dict(zip(("cos", "sin"), longer, strict=True)),
        "no angles": {"cos": None, "sin": None},
        "angles differ": {"sin": p.sin.bfloat16()},
    }[change]
    p = dataclasses.replace(p, **changed)
    given = (q, k, v, SCALE, MODES["exact"], 4, True, True, p, False)
    if change == "angles differ":
        # Left to Triton: nothing is read that is not there.
        assert not prepass.fits(q, k, v, MODES["exact"], p)
        return
    compare(*both(monkeypatch, *given))


def test_heads_that_share_their_memory(monkeypatch):
    q = make(2, 4, 300, 128, seed=0)
    k, v = (make(2, 1, 1500, 128, seed=n).expand(2, 4, 1500, 128) for n in (1, 2))
    p = steps("token", 4, 4, 1500, 128)
    got, want = both(monkeypatch, q, k, v, SCALE, MODES["fp8"], 4, True, True, p, False)
    compare(got, want)
    assert torch.equal(got.v[0], got.v[3]) and torch.equal(got.v_offset[4], got.v_offset[7])


def test_tokens_of_zeros_and_what_is_not_finite(monkeypatch):
    """By the norm of a token, whose factor Q gets after packing: the same rows are affected."""
    q, k, v = (make(1, 700, 4, 128, seed=n).transpose(1, 2) for n in range(3))
    p = steps("token", 4, 4, 700, 128)
    q[:, :, 5] = 0
    k[:, :, 6] = 0
    given = (q, k, v, SCALE, MODES["exact"], 4, True, True, p, False)
    got, want = both(monkeypatch, *given)
    compare(got, want)
    assert got.q_scale.isfinite().all() and (got.q_bound[:, 5] == 0).all()
    q[0, 1, 9, 3] = torch.nan
    q[0, 1, 10, 3] = torch.inf
    got = prepare.prepare(*given)
    bad = torch.zeros(4, 700, dtype=torch.bool, device="cuda")
    bad[:, 9:11] = True
    out = attend(q, k, v, "exact", prologue=p)[0]
    # The norm of a token is over all heads; a token of Inf has the norm 0 and 0 / 0 beside it.
    assert out[:, 9].isnan().all() and out[1, 10].isnan().all()
    assert out[~bad].isfinite().all()
    k[0, 2, 650, 3] = torch.nan
    out = attend(q, k, v, "exact", prologue=p)[0]
    assert out.isnan().all()


def attend(q, k, v, mode: str = "fp8", **options) -> torch.Tensor:
    return attention(q, k, v, mode, **options)


def inputs(keys: int, seed: int = 0):
    return [make(1, 2, length, 128, seed=seed + i) for i, length in enumerate((300, keys, keys))]


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("factor", [10.0, 60.0, 300.0, 1e5])
def test_values_far_away_are_kept(factor, seen):
    """Beyond the room that FP8 has, a head is packed again; and other heads stay as they were."""
    keys = 9000
    q, k, v = inputs(keys)
    want = attend(q, k, v)
    v[0, 1, sampled(keys)[100] if seen else unsampled(keys), 7] = factor
    got = attend(q, k, v)
    assert torch.equal(got[:, 0], want[:, 0])
    exact = attend(q, k, v, "exact", backend="reference")
    error = (got[..., 7].double() - exact[..., 7].double())[0, 1].norm() / exact[0, 1, :, 7].norm()
    assert error <= 0.1
    others = [n for n in range(128) if n != 7]
    rest = got[0, 1][:, others].double() - exact[0, 1][:, others].double()
    assert rest.norm() / exact[0, 1][:, others].double().norm() <= MODES["fp8"].max_error


@pytest.mark.parametrize("where", ["sampled", "unsampled"])
@pytest.mark.parametrize("far", [1e3, 1e4, 6e4])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_token_far_away_that_a_mask_hides_costs_no_more_than_its_range(mode, far, where):
    """In one channel of K and of V, as texts' padding may be: the rest is as exact as by Triton."""
    keys = 20000
    at = sampled(keys)[333] if where == "sampled" else unsampled(keys)
    q, k, v = inputs(keys)
    k[:, :, at, 3], v[:, :, at, 7] = far, far
    mask = torch.ones(keys, dtype=torch.bool, device="cuda")
    mask[at] = False
    exact = attend(q, k, v, "exact", backend="reference", mask=mask)
    found = []
    for backend in ("hopper", "triton"):
        got = attend(q, k, v, mode, backend=backend, mask=mask)
        of_channel = got[..., 7].double() - exact[..., 7].double()
        found.append(
            (
                (of_channel.norm() / exact[..., 7].double().norm()).item(),
                ((got.double() - exact.double()).norm() / exact.double().norm()).item(),
            )
        )
    for ours, theirs in zip(*found, strict=True):
        assert ours <= 1.2 * theirs + 0.002, found


@pytest.mark.parametrize("mode", list(MODES))
def test_keys_far_away_cost_no_more_where_they_are_sampled(mode):
    """Of rows that do not see them; the keys that share their scales are lost either way."""
    keys = 20000
    q, k, v = inputs(keys)
    q[..., 3] = -q[..., 3].abs() - 0.5
    places = sampled(keys)
    errors = []
    for at in (places[[333, 400, 900]], places[[333, 400, 900]] + 1):
        far = k.clone()
        far[:, :, at, 3] = 3e4
        want = attend(q, far, v, "exact", backend="reference").double()
        got = attend(q, far, v, mode).double()
        errors.append(((got - want).norm() / want.norm()).item())
    assert not set((places[[333, 400, 900]] + 1).tolist()) & set(places.tolist())
    assert errors[0] <= 1.1 * errors[1], errors


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", list(MODES))
def test_what_is_not_finite_is_seen_outside_of_the_sample_too(mode, bad):
    keys = 9000
    at = unsampled(keys)
    q, k, v = inputs(keys)
    v[0, 1, at, 9] = bad
    out = attend(q, k, v, mode)
    assert not out[0, 1, :, 9].isfinite().any()
    out[0, 1, :, 9] = 0
    assert out.isfinite().all()
    q, k, v = inputs(keys)
    k[0, 1, at, 9] = bad
    out = attend(q, k, v, mode)
    assert out[0, 1].isnan().all() and out[0, 0].isfinite().all()


def test_channels_of_one_value_are_exact():
    q, k, v = inputs(5000)
    v[:, :, :, :64] = 5.0
    for mode in MODES:
        out = attend(q, k, v, mode)
        assert (out[..., :64] == 5.0).all() and out.isfinite().all()


@pytest.mark.parametrize("mode", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["token", "split"])
def test_results_do_not_depend_on_who_came_first(name, mode):
    """Blocks take items as they come; sums are always in the same order."""
    q, k, v = (make(1, 8, 9000, 128, seed=n) for n in range(3))
    p = steps(name, 8, 8, 9000, 128)
    given = (q, k, v, SCALE, MODES[mode], 4, True, True, p)
    want = prepare.prepare(*given)
    other = torch.cuda.Stream()
    for n in range(40):
        with torch.cuda.stream(other):
            # Takes some of the processors away.
            make(1 << (20 + n % 4), seed=n)
        got = prepare.prepare(*given)
        for field, tensor in vars(want).items():
            if tensor is None:
                assert getattr(got, field) is None
                continue
            same = getattr(got, field).view(torch.uint8) == tensor.view(torch.uint8)
            assert same.all(), field


@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_two_streams_and_threads_do_not_meet(mode):
    given = [[make(1, 8, 9000, 128, seed=3 * n + i) for i in range(3)] for n in range(2)]
    p = steps("token", 8, 8, 9000, 128)
    # The second call of its kind is the first that is replayed.
    want = [attend(*x, mode, prologue=p) for x in given]
    torch.cuda.synchronize()
    results = [[], []]

    def work(x, found) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found.append(attend(*x, mode, prologue=p))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(given, results, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for first, found in zip(want, results, strict=True):
        assert len(found) == 20 and all(torch.equal(first, x) for x in found)


def test_a_graph_gives_the_same_for_other_numbers():
    q, k, v = inputs(3000)
    attend(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v)
    for seed in (10, 20):
        for x, fresh in zip((q, k, v), inputs(3000, seed), strict=True):
            x.copy_(fresh)
        graph.replay()
        want = attend(q, k, v)
        assert torch.equal(out, want) and math.isfinite(out.float().sum().item())
