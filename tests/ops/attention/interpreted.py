"""The Triton kernels of `attention` on the CPU, in Triton's interpreter; `test_interpreted.py` runs
this file.

fp16 only: `tl.dot` is wrong with bf16 in the interpreter.
"""

import math

import pytest
import torch
import triton
import triton.language as tl

from lowbit.ops.attention import prepare as module
from lowbit.ops.attention import prepass, reference
from lowbit.ops.attention import triton as backend
from lowbit.ops.attention.kernels import values
from lowbit.ops.attention.modes import MODES
from lowbit.ops.layout import Layout, Swizzle, key_order
from tests.ops.attention.samples import center, sampled

TILE = module.TILE
TINY = torch.finfo(torch.float32).tiny
LOG2E = math.log2(math.e)
# In the interpreter a mantissa of FP8 that rounds up does not carry into the exponent: P is off.
FACTOR = {"exact": 1.0, "int8": 1.0, "fp8": 2.0}
# Relative L2 error that P's rounding adds; of FP8 as the interpreter has it.
ROUNDING_OF_P = {"exact": 0.0006, "int8": 0.008, "fp8": 0.07}
# Log-sum-exp: the error of one logit, INT8 by INT8, of the largest among some hundred.
LSE_ERROR = 0.05


def make(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def inputs(b=1, h=1, kv=None, length=33, keys=70, d=64):
    kv = kv or h
    # A bias of K is what taking its mean off is for.
    k = make(b, kv, keys, d, seed=1) + 2 * make(d, seed=3)
    return make(b, h, length, d, seed=0), k, make(b, kv, keys, d, seed=2)


def cut(mode) -> backend.Cut:
    return backend.Cut(64, 128 if mode.name == "int8" else 64, 4, 1)


def attend(q, k, v, mode, mask=None, causal=False):
    """(out, lse) of the kernel, of buffers poisoned with NaN, and those of the reference."""
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    results = []
    for run, more in ((backend.run_cut, (cut(mode),)), (reference.run, ())):
        out = torch.full_like(q, torch.nan)
        lse = torch.full(q.shape[:3], torch.nan)
        run(out, lse, q, k, v, mode, mask, causal, q.shape[3] ** -0.5, *more)
        results.append((out, lse))
    return results


def check(results, mode):
    (out, lse), (want, want_lse) = results
    error = (out.double() - want.double()).norm() / want.double().norm()
    assert error <= mode.max_error * FACTOR[mode.name]
    finite = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), finite)
    assert ((lse - want_lse)[finite].abs() <= LSE_ERROR).all()


each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)


@each_mode
@pytest.mark.parametrize(
    "shape",
    [
        {"length": 130, "keys": 200, "d": 128},
        {"b": 2, "h": 2, "kv": 1},
        {"length": 63, "keys": 1, "d": 96},
        {"length": 1, "keys": 129, "d": 40},
    ],
    ids=str,
)
def test_attention_is_near_float64(mode, shape):
    check(attend(*inputs(**shape), mode), mode)


@each_mode
@pytest.mark.parametrize(
    "shape", [{"length": 130, "keys": 1000, "d": 128}, {"b": 2, "h": 2, "kv": 1}], ids=str
)
def test_what_is_stored_is_attended_to(mode, shape):
    """Nothing but P is rounded after that, and the result."""
    q, k, v = inputs(**shape)
    (out, _), _ = attend(q, k, v, mode)
    ready = module.prepare(q, k, v, q.shape[3] ** -0.5, mode, 1, False, False)
    want = reference.of_copies(ready, v, q.shape[2], k.shape[2])
    error = (out.flatten(0, 1).double() - want).norm() / want.norm()
    assert error <= ROUNDING_OF_P[mode.name]


@each_mode
def test_one_key_is_returned(mode):
    (out, _), (want, _) = attend(*inputs(length=3, keys=1), mode)
    assert torch.equal(out, want)


@each_mode
def test_causal_attention_is_near_float64(mode):
    check(attend(*inputs(length=150, keys=140), mode, causal=True), mode)


@each_mode
def test_masks_are_near_float64_and_hidden_rows_are_zero(mode):
    q, k, v = inputs(h=2, length=20, keys=150)
    hides = torch.rand(1, 2, 20, 150, generator=torch.Generator().manual_seed(4)) > 0.3
    hides[:, :, 3] = False
    results = attend(q, k, v, mode, hides)
    check(results, mode)
    (out, lse), _ = results
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    added = make(1, 1, 1, 150, seed=5)
    added[..., 100:] = -torch.inf
    check(attend(q, k, v, mode, added), mode)
    check(attend(q, k, v, mode, added.float()), mode)


@each_mode
def test_nan_and_infinity_in_a_mask_reach_the_rows_that_see_the_key(mode):
    q, k, v = inputs(h=2, length=20, keys=150)
    for bad in (torch.nan, torch.inf):
        for at, causal in ((140, False), (6, True)):
            added = torch.zeros(1, 2, 20, 150)
            added[0, 1, 4:, at] = bad
            (out, _), (want, _) = attend(q, k, v, mode, added, causal)
            seen = torch.zeros(1, 2, 20, 1, dtype=torch.bool)
            seen[0, 1, 6 if causal else 4 :] = True
            for got in (out, want):
                assert torch.equal(got.isnan(), seen.expand_as(got))


@each_mode
def test_strides_do_not_matter(mode):
    q, k, v = inputs(h=2)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    apart = [torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan).half() for x in (q, k, v)]
    for wide, x in zip(apart, (q, k, v), strict=True):
        wide[..., ::2] = x
    (want, want_lse), _ = attend(q, k, v, mode)
    for views in (moved, [wide[..., ::2] for wide in apart]):
        (out, lse), _ = attend(*views, mode)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


@each_mode
def test_nan_in_a_query_stays_in_its_row_and_nan_in_v_in_its_channel(mode):
    q, k, v = inputs()
    q[0, 0, 5, 7] = torch.nan
    (out, _), _ = attend(q, k, v, mode)
    assert out[0, 0].isnan().all(dim=1).nonzero().flatten().tolist() == [5]
    assert not out[0, 0, torch.arange(33) != 5].isnan().any()
    q, k, v = inputs()
    v[0, 0, 3, 9] = torch.nan
    (out, _), _ = attend(q, k, v, mode)
    assert out[0, 0].isnan().all(dim=0).nonzero().flatten().tolist() == [9]
    assert out.isnan().sum() == 33


@each_mode
def test_constant_keys_give_the_mean_of_v(mode):
    q, k, v = inputs()
    k[:] = k[:, :, :1]
    (out, _), _ = attend(q, k, v, mode)
    # What INT8 or FP8 rounds off V, its mean has back.
    assert (out.float() - v.float().mean(2, keepdim=True)).abs().max() <= 2**-10


@each_mode
def test_one_huge_key_is_taken_whole_or_left(mode):
    q, k, v = inputs(keys=200)
    k[0, 0, 10] *= 300
    (out, _), (want, _) = attend(q, k, v, mode)
    assert torch.isfinite(out).all()
    taken = (want == v[:, :, 10:11]).all(dim=3)
    assert taken.sum() > 5
    error = (out.double() - want.double())[taken].norm() / want.double()[taken].norm()
    assert error <= mode.max_error


def prepared(groups: int, swizzled: bool, mode: str, keys=200, length=150):
    q, k, v = inputs(h=2, length=length, keys=keys, d=128)
    return (q, k, v), module.prepare(q, k, v, 0.1, MODES[mode], groups, swizzled, True)


def padded(x: torch.Tensor) -> torch.Tensor:
    """x [H, L, D] with zeros up to a multiple of 128 tokens, float32."""
    full = torch.zeros(x.shape[0], module.count(x.shape[1]) * TILE, x.shape[2])
    full[:, : x.shape[1]] = x
    return full


@pytest.mark.parametrize("groups", [1, 4])
def test_stored_queries_and_keys_are_those_of_torch(groups):
    (q, k, _), got = prepared(groups, False, "exact")
    rows = padded(q[0].float())
    step = (rows.abs().amax(2) / 127).clamp_min(TINY)
    codes = (rows * (1 / step)[..., None]).round()
    assert torch.equal(got.q.reshape(codes.shape).float(), codes)
    torch.testing.assert_close(got.q_scale, step * torch.tensor(0.1 * LOG2E))
    torch.testing.assert_close(got.q_bound, got.q_scale * codes.norm(dim=2))
    mean = center(k[0])[:, None]
    near = padded(k[0].float() - mean)
    tiles = near.reshape(2, -1, TILE // (2 * groups), groups, 2, 128)
    step = (tiles.abs().amax((2, 4, 5)) / 127).clamp_min(TINY)
    torch.testing.assert_close(got.k_scale, step)
    each = step[:, :, None, :, None, None]
    codes = got.k.reshape(tiles.shape).float()
    # Means are added up in another order: a value near half a step may go the other way.
    assert ((codes * each - tiles).abs() <= each * 0.501).all()
    norms = (codes * each).norm(dim=5).amax((2, 3, 4))
    torch.testing.assert_close(got.k_bound, norms)
    shift = 0.1 * (q[0].float() * mean).sum(2)
    torch.testing.assert_close(got.shift, shift, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [1, 9, 17, 24, 1000, 1024, 1025, 5000])
def test_what_is_taken_off_the_keys_is_of_a_sample(keys):
    k = torch.randn(1, 1, keys, 64, generator=torch.Generator().manual_seed(0)).half()
    places = sampled(keys)
    assert (places.diff() > 0).all() and places[0] >= 0 and places[-1] < keys
    if keys <= prepass.SAMPLE:
        assert torch.equal(places, torch.arange(keys))
    elif keys > 2 * prepass.SAMPLE:
        # Not the same place of each part: images have rows.
        assert len((places - torch.arange(len(places)) * keys // len(places)).unique()) > 2
    got = module._center(k, module.NO_STEPS)
    torch.testing.assert_close(got, center(k[0]), rtol=0, atol=1e-5)
    # And about their mean.
    deviation = got[0] - k[0, 0].float().mean(0)
    assert deviation.square().mean() <= 2 * 1.4 / len(places)


@pytest.mark.parametrize("far", [100.0, 6e4])
def test_tokens_far_away_do_not_move_it(far):
    """Of a sample that has some, in one channel; the others stay as they were, bit for bit."""
    keys = 3000
    k = torch.randn(1, 1, keys, 64, generator=torch.Generator().manual_seed(0)).half()
    before = module._center(k, module.NO_STEPS)[0]
    k[0, 0, sampled(keys)[[5, 400, 401, 1000]], 7] = far
    after = module._center(k, module.NO_STEPS)[0]
    assert 0 < (after - before).abs()[7] <= 0.1
    assert torch.equal(after[8:], before[8:])


@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_stored_values_keep_the_mean_of_each_channel(mode):
    (_, _, v), got = prepared(1, False, mode)
    codes = got.v.float().transpose(2, 3).reshape(2, -1, 128)[:, : v.shape[2]]
    torch.testing.assert_close(got.v_sum.sum(1), codes.sum(1))
    back = codes * got.v_scale[:, None] + got.v_offset[:, None]
    want = v[0].float()
    step = got.v_scale[:, None] * (0.5 if mode == "int8" else 16)
    # And a little for the mean of 200 roundings, which the offset takes back.
    assert ((back - want).abs() <= 1.3 * step).all()
    torch.testing.assert_close(back.mean(1), want.mean(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_swizzled_copies_are_the_plain_ones_in_another_order(mode):
    _, plain = prepared(4, False, mode)
    _, got = prepared(4, True, mode)
    layout = Layout((TILE, 128), (128, 1), Swizzle(3, 4, 3))
    places = torch.tensor([[layout(row, byte) for byte in range(128)] for row in range(TILE)])
    assert torch.equal(got.q.reshape(2, -1, TILE * 128)[..., places], plain.q)
    assert torch.equal(got.k.reshape(2, -1, TILE * 128)[..., places], plain.k)
    order = torch.tensor(key_order())
    keys = (torch.arange(0, TILE, 16)[:, None] + order).flatten()
    as_bytes = got.v.view(torch.int8).reshape(2, -1, TILE * 128)[..., places]
    assert torch.equal(as_bytes, plain.v.view(torch.int8)[..., keys])


def test_rounding_to_fp8_is_torchs():
    """V's codes against a cast, subnormals among them."""
    v = make(1, 1, 300, 64, seed=6)
    v[:, :, :, :8] *= torch.linspace(0, 1, 300)[:, None] ** 12
    got = module.prepare(v, v, v, 0.1, MODES["fp8"], 1, False, False)
    mean = v[0].float().mean(1, keepdim=True)
    want = padded((v[0].float() - mean) * (1 / got.v_scale)[:, None]).to(torch.float8_e4m3fn)
    codes = got.v.transpose(2, 3).reshape(want.shape)
    assert (codes.float() != want.float()).float().mean() <= 0.002


@triton.jit
def _rounded(x, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, values._e4m3(tl.load(x + at)))


def test_every_number_of_fp8_and_those_between_two_are_rounded_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].unique()
    between = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(between, torch.tensor(end)) for end in (-1e9, 1e9)]
    x = torch.zeros(1024)
    some = torch.cat((codes, between, *near, torch.tensor([1e-40, -1e-30, -0.0])))
    x[: len(some)] = some
    x[-3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    out = torch.empty_like(x)
    _rounded[(1,)](x, out, 1024)
    assert torch.equal(out[:-3], x[:-3].to(torch.float8_e4m3fn).float())
    assert not out[-3:].isfinite().any()


def test_inputs_are_not_written_to():
    q, k, v = inputs()
    before = [x.clone() for x in (q, k, v)]
    for mode in MODES.values():
        attend(q, k, v, mode)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
