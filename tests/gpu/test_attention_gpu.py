"""`attention` on the GPU: every backend, mode, head size and length against float64."""

import pytest
import torch

from lowbit.ops import registry, tuning
from lowbit.ops.attention import OP, Prologue, attention, hopper, reference, scheme
from lowbit.ops.attention.modes import MODES

BACKENDS = ("hopper", "triton")
# Of one logit, INT8 by INT8; the log-sum-exp of one key has all of it.
LSE_ERROR = 0.06


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def inputs(b=1, h=2, kv=None, length=300, keys=1000, d=128, dtype=torch.bfloat16):
    kv = kv or h
    shapes = ((b, h, length, d), (b, kv, keys, d), (b, kv, keys, d))
    return [make(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def unshared(units: int, blocks: int, at_once: int) -> tuple[int, int]:
    """In the place of `hopper.split`: each block of threads has all keys of its rows."""
    return units, 1


def shared_by_three(units: int, blocks: int, at_once: int) -> tuple[int, int]:
    """In the place of `hopper.split`: three blocks of threads share the keys of all rows."""
    return (0, 3) if blocks >= 3 else (units, 1)


WAYS = [(backend, mode) for backend in BACKENDS for mode in MODES]
WAYS += [("hopper", mode, "shared") for mode in MODES]
SPLIT = hopper.split


def change(monkeypatch, name: str, value) -> None:
    """Set what calls are prepared by, also those that were before."""
    monkeypatch.setattr(hopper, name, value)
    tuning.forget()


@pytest.fixture(params=WAYS, ids="-".join)
def way(request, monkeypatch):
    backend, mode, *more = request.param
    if more:
        change(monkeypatch, "split", shared_by_three)
    needs = next(
        b.needs for b in registry.backends(OP) if b.name == backend and mode in str(b.needs)
    )
    call = registry.Call(scheme(mode, None), torch.device("cuda", 0), 0, 128)
    reason = registry.unmet(needs, call)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    yield {"mode": mode, "backend": backend}
    # Whatever else was changed by hand.
    monkeypatch.undo()
    tuning.forget()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int8)


def runs(way, q, k, v, **options):
    """(out, lse) of the backend and of the reference; the memory it takes starts as NaN.

    Twice: a call that was prepared before gives the same.
    """
    # Then torch fills what it makes empty with NaN, and integers with their largest.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got, again = (attention(q, k, v, **way, **options, return_lse=True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, again, strict=True))
    return got, attention(q, k, v, "exact", **options, return_lse=True, backend="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"b": 2, "h": 4, "kv": 2},
        {"length": 63, "keys": 63},
        {"length": 1, "keys": 129},
        {"length": 129, "keys": 128},
        {"length": 1000, "keys": 4096},
    ],
    ids=str,
)
def test_attention_is_near_float64(way, shape, dtype):
    (out, lse), (want, want_lse) = runs(way, *inputs(**shape, dtype=dtype))
    assert error(out, want) <= MODES[way["mode"]].max_error
    assert (lse - want_lse).abs().max() <= LSE_ERROR


def test_one_key_is_returned(way):
    q, k, v = inputs(length=5, keys=1)
    (out, lse), (want, want_lse) = runs(way, q, k, v)
    assert torch.equal(out, want)
    assert (lse - want_lse).abs().max() <= LSE_ERROR


@pytest.mark.parametrize("d", [40, 64, 96, 256])
def test_other_head_sizes(way, d):
    if way["backend"] != "triton":
        pytest.skip("head size 128 only")
    (out, _), (want, _) = runs(way, *inputs(length=200, keys=333, d=d))
    assert error(out, want) <= MODES[way["mode"]].max_error


def test_masks(way):
    if way["backend"] != "triton":
        pytest.skip("has masks of keys only")
    q, k, v = inputs(length=200, keys=333)
    hides = make(1, 1, 200, 333, seed=5) > -0.5
    hides[:, :, 7] = False
    for options in ({"mask": hides}, {"mask": make(1, 1, 1, 333, seed=6), "causal": True}):
        (out, lse), (want, want_lse) = runs(way, q, k, v, **options)
        # Some rows see a few keys only, whose error no others even out.
        assert error(out, want) <= 1.2 * MODES[way["mode"]].max_error
        assert torch.equal(torch.isfinite(lse), torch.isfinite(want_lse))
    out, lse = attention(q, k, v, **way, mask=hides, return_lse=True)
    assert (out[:, :, 7] == 0).all() and (lse[:, :, 7] == -torch.inf).all()


def masks_of_keys(b: int, h: int, keys: int) -> dict[str, torch.Tensor]:
    """A text's that stands before an image; blocks hidden whole, biases, no key left."""
    text = torch.ones(b, 1, 1, keys, dtype=torch.bool, device="cuda")
    text[-1, ..., 30:300] = False
    end = torch.ones_like(text)
    end[..., keys - 200 :] = False
    some = make(1, h, 1, keys, seed=5) > 0
    nothing = torch.ones_like(text)
    nothing[0] = False
    return {
        **{"text": text, "end": end, "some": some, "nothing": nothing},
        "host": (text.bfloat16() - 1) * torch.finfo(torch.bfloat16).max,
        "biases": make(1, h, 1, keys, seed=6).float(),
        "far": torch.linspace(0, 400, keys, device="cuda"),
        "one": torch.arange(keys, device="cuda") == 5,
    }


@pytest.mark.parametrize("name", ["text", "end", "some", "nothing", "host", "biases", "far", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_of_keys(way, name, dtype):
    q, k, v = inputs(b=2, h=2, length=200, keys=1000, dtype=dtype)
    mask = masks_of_keys(2, 2, 1000)[name]
    (out, lse), (want, want_lse) = runs(way, q, k, v, mask=mask)
    assert torch.equal(torch.isfinite(lse), torch.isfinite(want_lse))
    finite = torch.isfinite(want_lse)
    # A logit of hundreds is a float32 with an error of its own.
    assert (lse - want_lse)[finite].abs().max() <= LSE_ERROR + 1e-3 * want_lse[finite].abs().max()
    # A few keys are left, whose error no others even out.
    few = 3 if name == "far" else 1.1
    assert error(out, want) <= few * MODES[way["mode"]].max_error
    if name == "nothing":
        assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("key", [5, 200, 999])
def test_nan_and_infinity_in_a_mask_reach_the_rows_of_the_head(way, bad, key):
    """Among keys that are hidden and biased too, in the first block that is taken and in others."""
    q, k, v = inputs(b=2, h=2, length=200, keys=1000)
    mask = torch.zeros(2, 2, 1, 1000, device="cuda")
    mask[..., 300:600] = -torch.inf
    mask[..., 700:] = 0.5
    clean = attention(q, k, v, **way, mask=mask)
    mask[1, 0, 0, key] = bad
    out = attention(q, k, v, **way, mask=mask)
    assert out[1, 0].isnan().all()
    out[1, 0] = clean[1, 0]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("lengths", [(200, 333), (333, 200), (1000, 1000), (129, 1), (1, 129)])
def test_causal(way, lengths):
    q, k, v = inputs(length=lengths[0], keys=lengths[1])
    (out, lse), (want, want_lse) = runs(way, q, k, v, causal=True)
    # The first rows see a few keys only.
    assert error(out, want) <= 1.2 * MODES[way["mode"]].max_error
    assert (lse - want_lse).abs().max() <= LSE_ERROR


def steps(name: str, heads: int, kv: int, tokens: int) -> Prologue:
    """What Wan and Qwen-Image do to Q and K."""
    angle = 3 * make(tokens, 64, seed=9, dtype=torch.float32)
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    if name == "wan":
        w = [1 + 0.2 * make(n * 128, seed=7 + n) for n in (heads, kv)]
        return Prologue("token", 1e-6, *w, **tables)
    w = [1 + 0.2 * make(2, 128, seed=n) for n in (7, 8)]
    return Prologue("head", 1e-6, *w, first=77, **tables)


@pytest.mark.parametrize("name", ["wan", "qwen"])
@pytest.mark.parametrize("rotate", [True, False])
def test_prologue_is_near_float64_in_both_layouts(way, name, rotate):
    q, k, v = (3 * x for x in inputs(b=2, h=4, kv=2, length=300, keys=700))
    options = {"prologue": steps(name, 4, 2, 700), "rotate": rotate}
    (out, lse), (want, want_lse) = runs(way, q, k, v, **options)
    assert error(out, want) <= MODES[way["mode"]].max_error
    assert (lse - want_lse).abs().max() <= LSE_ERROR
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attention(*moved, **way, **options), out)


def test_prologue_with_other_head_sizes(way):
    if way["backend"] != "triton":
        pytest.skip("head size 128 only")
    for d in (40, 64, 256):
        q, k, v = (3 * x for x in inputs(h=2, length=200, keys=333, d=d))
        weight = 1 + 0.2 * make(2 * d, seed=9)
        prologue = Prologue("token", 1e-6, weight, weight)
        for rotate in (True, False):
            (out, _), (want, _) = runs(way, q, k, v, prologue=prologue, rotate=rotate)
            assert error(out, want) <= MODES[way["mode"]].max_error


def test_rotation_takes_the_outliers_out_of_q_and_k(way):
    q, k, v = inputs(length=300, keys=4096)
    for x in (q, k):
        x[..., ::37] *= 5
    (plain, _), (want, _) = runs(way, q, k, v)
    (rotated, _), _ = runs(way, q, k, v, rotate=True)
    # FP8 keeps the error of its P·V.
    share = 0.95 if way["mode"] == "fp8" else 0.8
    assert error(rotated, want) <= share * error(plain, want)


def test_both_layouts_give_equal_results_and_strided_views_near_ones(way):
    q, k, v = inputs(b=2, h=3, length=333, keys=700)
    want = attention(q, k, v, **way)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(attention(*moved, **way), want)
    wide = [torch.full((*x.shape[:3], 256), torch.nan, device="cuda").to(x) for x in (q, k, v)]
    for w, x in zip(wide, (q, k, v), strict=True):
        w[..., ::2] = x
    # Other loads add up K's means in another order: a few codes round the other way. Of V all do:
    # other kernels take another mean off.
    near = MODES[way["mode"]].max_error / (4 if way["mode"] == "exact" else 1)
    assert error(attention(*(w[..., ::2] for w in wide), **way), want) <= near
    odd = [torch.full((*x.shape[:3], 129), torch.nan, device="cuda").to(x) for x in (q, k, v)]
    for o, x in zip(odd, (q, k, v), strict=True):
        o[..., 1:] = x
    assert error(attention(*(o[..., 1:] for o in odd), **way), want) <= near


def test_a_key_length_is_a_shorter_view(way):
    """What stands behind it, of memory that is NaN here, is not read into the result."""
    q, k, v = inputs(b=2, length=200, keys=1000)
    want = attention(q, k[:, :, :700].clone(), v[:, :, :700].clone(), **way)
    k[:, :, 700:] = v[:, :, 700:] = torch.nan
    assert torch.equal(attention(q, k[:, :, :700], v[:, :, :700], **way), want)


def data(kind: str, length: int, heads: int = 1):
    q, k, v = inputs(h=heads, length=length, keys=length)
    if kind == "bias":
        # Clusters of tokens, a bias of K and of V.
        q, k = (
            x
            + make(1, heads, 64, 128, seed=9).repeat_interleave(length // 64 + 1, 2)[:, :, :length]
            for x in (q, k)
        )
        k, v = k + 8 * make(1, heads, 1, 128, seed=8), v + make(1, heads, 1, 128, seed=7)
    if kind == "outliers":
        for x in (q, k, v):
            x[..., ::37] *= 5
    return q, k, v


# Relative L2 error at most: INT8 logits err in proportion to their size, and biased or spread data
# has larger ones than normal data, for which the mode's own bound holds.
BOUNDS = {"normal": 1.0, "bias": 1.0, "outliers": 3.0}


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("length", [4096, 32760, 75600])
def test_errors_at_length(way, kind, length):
    q, k, v = data(kind, length)
    rows = slice(0, length, length // 64)
    out = attention(q, k, v, **way)[:, :, rows]
    want = torch.empty_like(out)
    reference.run(want, None, q[:, :, rows], k, v, None, None, False, 128**-0.5)
    assert error(out, want) <= BOUNDS[kind] * MODES[way["mode"]].max_error


@pytest.mark.parametrize("length", [1, 130, 600])
def test_blocks_that_share_their_copies_give_the_same_bits(monkeypatch, way, length):
    """Odd and even numbers of tiles, more than one batch and head of K, many times."""
    if way["backend"] != "hopper" or way["mode"] not in hopper.LONG_VARIANTS:
        pytest.skip("the kernel of long sequences alone")
    if hopper.split is not SPLIT:
        pytest.skip("sets what is shared itself")
    # They share copies by two, and so their keys with others.
    change(monkeypatch, "split", unshared)
    q, k, v = inputs(b=2, h=4, kv=2, length=length, keys=3000)
    want = attention(q, k, v, **way, return_lse=True)
    change(monkeypatch, "LONG_KEYS", 3000)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        for x, y in zip(attention(q, k, v, **way, return_lse=True), want, strict=True):
            different += (x != y).sum()
    assert different == 0


def shared(whole: int, parts: int):
    """In the place of `hopper.split`: so many units whole, others in so many parts."""
    return lambda units, blocks, at_once: (whole, parts)


@pytest.mark.parametrize("whole, parts", [(0, 2), (6, 3), (7, 23)])
@pytest.mark.parametrize("long", [False, True])
def test_shared_keys_are_all_seen_once(monkeypatch, way, whole, parts, long):
    """Two batches, two heads of Q for each of K, four tiles; copies by blocks and by pairs."""
    if way["backend"] != "hopper" or hopper.split is not SPLIT:
        pytest.skip("the Hopper kernel alone, which is told here what is shared")
    if long and way["mode"] not in hopper.LONG_VARIANTS:
        pytest.skip("has one kernel for all lengths")
    change(monkeypatch, "LONG_KEYS", 2900 if long else 32000)
    q, k, v = inputs(b=2, h=4, kv=2, length=500, keys=2900)
    for options in ({}, {"mask": masks_of_keys(2, 4, 2900)["some"]}, {"mask": ends(2900)}):
        change(monkeypatch, "split", shared(whole, parts))
        (out, lse), (want, want_lse) = runs(way, q, k, v, **options)
        assert error(out, want) <= MODES[way["mode"]].max_error
        assert (lse - want_lse).abs().max() <= LSE_ERROR
        different = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(100):
            again = attention(q, k, v, **way, **options, return_lse=True)
            different += (again[0] != out).sum() + (again[1] != lse).sum()
        assert different == 0
        change(monkeypatch, "split", unshared)
        out, whole_lse = attention(q, k, v, **way, **options, return_lse=True)
        assert error(out, want) <= MODES[way["mode"]].max_error
        assert (lse - whole_lse).abs().max() <= LSE_ERROR / 3


def ends(keys: int) -> torch.Tensor:
    """Of the keys only the first and the last 300: most parts of them see none."""
    index = torch.arange(keys, device="cuda")
    return ((index < 300) | (index >= keys - 300)).view(1, 1, 1, keys)


@pytest.mark.parametrize("growth", [3, 20, 100])
@pytest.mark.parametrize("backwards", [True, False])
def test_maximum_that_moves_all_the_time(way, growth, backwards):
    """Logits rise with the key's index, or fall: by a little, or far beyond what FP8 can hold."""
    q, k, v = inputs(length=256, keys=2000)
    line = torch.linspace(0, 1, 2000, device="cuda")[:, None]
    direction = make(128, seed=4)
    q = (q.float() * 0.1 + direction).bfloat16()
    k = (
        k.float() * 0.1 + direction * (growth / 11) * (line.flip(0) if backwards else line)
    ).bfloat16()
    (out, lse), (want, want_lse) = runs(way, q, k, v)
    assert torch.isfinite(out).all()
    # One step of K's INT8, of the 128 · growth / 11 that a logit is made of at most.
    assert (lse - want_lse).abs().max() <= 0.02 * growth
    assert error(out, want) <= MODES[way["mode"]].max_error + 0.01 * growth


@pytest.mark.parametrize("peaks", [False, True])
def test_sums_of_one_sign_over_many_keys(way, peaks):
    """P at its largest everywhere, or at few keys; values of one sign for thousands of keys."""
    q, k, v = inputs(length=200, keys=6000)
    k *= 0
    if peaks:
        k[:, :, ::128] = q[:, :, :1]
    v = torch.ones_like(v)
    v[:, :, 4500:] = -1
    (out, lse), (want, want_lse) = runs(way, q, k, v)
    assert (out.double() - want.double()).abs().max() <= 0.01
    assert (lse - want_lse).abs().max() <= 0.02 * want_lse.abs().max()


@pytest.mark.parametrize("size", [1, 30, 300, 3000])
def test_modes_agree_on_large_logits(way, size):
    """Up to some 400,000,000. The logits of all modes are the same."""
    if way["backend"] != "hopper" and size > 300:
        pytest.skip("Triton's kernels take the rounded maximum off")
    q, k, v = inputs(keys=3000)
    q, k = q * size, k * size
    want = attention(q, k, v, "exact", backend=way["backend"])
    assert torch.isfinite(want).all()
    # Most rows see one key, whose error no others even out.
    assert error(attention(q, k, v, **way), want) <= 1.2 * MODES[way["mode"]].max_error


@pytest.mark.parametrize("outlier", [300, 3e4, 6.5e4])
def test_one_huge_outlier(way, outlier):
    """Of one key and one query in the same channel: the row sees that key alone, or not at all."""
    if way["backend"] != "hopper" and outlier > 300:
        pytest.skip("Triton's kernels take the rounded maximum off")
    q, k, v = inputs(length=200, keys=3000)
    q[:, :, 5, 7] = k[:, :, 1234, 7] = outlier
    out = attention(q, k, v, **way)
    assert torch.isfinite(out).all()
    assert error(out[:, :, 5], v[:, :, 1234]) <= 2 * MODES[way["mode"]].max_error
    q[:, :, 5, 7] = -outlier
    assert torch.isfinite(attention(q, k, v, **way)).all()


def test_values_that_follow_the_logits(way):
    """Sums of one sign: what tensor cores cut off shows in the output's size, and in the lse."""
    q, k, v = inputs(length=200, keys=4096, dtype=torch.float16)
    # As many keys above zero as below, of a sample too: V's codes are exact.
    fours = (k * k[..., 3:4].sign())[:, :, :2048].unflatten(2, (512, 4))
    q, k = torch.zeros_like(q), torch.stack((fours, -fours), 3).flatten(2, 4)
    q[..., 3] = 128**0.5
    v = k[..., 3:4].sign().expand_as(v).contiguous()
    (out, lse), (want, want_lse) = runs(way, q, k, v)
    slope = (out.double() * want.double()).sum() / want.double().square().sum()
    assert abs(slope.item() - 1) <= 0.003
    assert (lse - want_lse).mean().abs() <= 0.01


def test_nan_stays_in_its_row_and_channel(way):
    q, k, v = inputs()
    clean = attention(q, k, v, **way)
    q[0, 0, 5, 7] = torch.nan
    out = attention(q, k, v, **way)
    assert out[0, 0, 5].isnan().all()
    out[0, 0, 5] = clean[0, 0, 5]
    if way == {"mode": "int8", "backend": "hopper"}:
        # Rows of a warp begin new sums together.
        assert error(out, clean) <= 1e-4
    else:
        assert torch.equal(out, clean)
    q, k, v = inputs()
    v[0, 1, 3, 9] = torch.nan
    out = attention(q, k, v, **way)
    assert out[0, 1, :, 9].isnan().all()
    assert out.isnan().sum() == 300
    q, k, v = inputs()
    k[0, 1, 3, 9] = torch.nan
    out = attention(q, k, v, **way)
    assert out[0, 1].isnan().all() and not out[0, 0].isnan().any()


def test_inputs_are_not_written_to(way):
    q, k, v = inputs()
    before = [x.clone() for x in (q, k, v)]
    attention(q, k, v, **way)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_thousands_of_calls_give_one_result(way):
    """A race would show as another result."""
    q, k, v = inputs(h=8, length=1000, keys=1000)
    want = attention(q, k, v, **way)
    assert torch.isfinite(want).all()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(2000):
        different += (attention(q, k, v, **way) != want).sum()
    assert different == 0


def test_compiled_attention_is_one_graph(way):
    q, k, v = inputs()

    def run(q, k, v):
        return attention(q * 2, k, v, **way) + 1

    assert torch.equal(torch.compile(run, fullgraph=True)(q, k, v), run(q, k, v))
