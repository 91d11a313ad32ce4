"""Norms, rotary embedding and rotation of Q and K in Triton's interpreter; `test_interpreted.py`
runs this file.
"""

import pytest
import torch

from lowbit.ops.attention import prepare as module
from lowbit.ops.attention import reference
from lowbit.ops.attention import triton as backend
from lowbit.ops.attention.modes import MODES
from lowbit.ops.attention.prologue import NOTHING, Prologue
from tests.ops.attention.samples import center

EPS = 1e-6
LENGTH, KEYS, HEADS, KV = 40, 130, 2, 1


def make(*shape: int, seed: int, dtype=torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(d: int):
    shapes = ((1, HEADS, LENGTH, d), (1, KV, KEYS, d), (1, KV, KEYS, d))
    # Laid out as [B, L, H, D], and larger than a norm leaves them.
    q, k, v = (make(*s, seed=i).transpose(1, 2).contiguous() for i, s in enumerate(shapes))
    return 3 * q.transpose(1, 2), 3 * k.transpose(1, 2), v.transpose(1, 2)


def tables(d: int, dtype=torch.float32) -> dict:
    angle = make(KEYS + 3, d // 2, seed=9, dtype=torch.float32) * 3
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


def weights(heads: int, kv: int, d: int, rows: int = 1) -> dict:
    q, k = (0.2 * make(rows, n * d, seed=7 + n) + 1 for n in (heads, kv))
    return {"q_weight": q if rows > 1 else q[0], "k_weight": k if rows > 1 else k[0]}


def prologues(d: int) -> dict[str, Prologue]:
    return {
        "head": Prologue("head", EPS),
        "rope": Prologue(**tables(d)),
        "wan": Prologue("token", EPS, **weights(HEADS, KV, d), **tables(d)),
        "qwen": Prologue("head", EPS, **weights(1, 1, d, rows=2), first=21, **tables(d)),
        "half": Prologue("token", EPS, **weights(HEADS, KV, d, rows=2), first=21),
        "tables": Prologue("head", 0.1, **weights(1, 1, d), **tables(d, torch.bfloat16)),
    }


@pytest.mark.parametrize(
    ("name", "d"), [*((name, 64) for name in prologues(64)), ("wan", 40), ("qwen", 40)]
)
def test_stored_queries_and_keys_are_those_of_float64(name, d):
    q, k, v = inputs(d)
    prologue = prologues(d)[name]
    got = module.prepare(q, k, v, 1.0, MODES["exact"], 1, False, True, prologue)
    want = reference.prepared(q, prologue.q_weight, prologue).flatten(0, 1)
    rows = got.q.flatten(1, 2)[:, :LENGTH, :d].double()
    scale = got.q_scale[:, :LENGTH, None].double() / module.LOG2E
    assert ((rows * scale - want).abs() <= 0.501 * scale).all()
    keys = reference.prepared(k, prologue.k_weight, prologue).flatten(0, 1)
    mean = center(keys)[:, None]
    rows = got.k.flatten(1, 2)[:, :KEYS, :d].double()
    scale = got.k_scale.double().repeat_interleave(module.TILE, 1)[:, :KEYS]
    assert ((rows * scale - (keys - mean)).abs() <= 0.502 * scale).all()
    # Rows that fill up the last tile.
    assert (got.q.flatten(1, 2)[:, LENGTH:] == 0).all() and not got.q_bound.isnan().any()
    assert (got.k.flatten(1, 2)[:, KEYS:] == 0).all()
    shift = want @ mean.repeat_interleave(HEADS // KV, 0).transpose(1, 2)
    torch.testing.assert_close(got.shift.double(), shift[..., 0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("mode", "name", "rotate"), [("exact", "wan", True), ("int8", "qwen", False)]
)
def test_attention_after_a_prologue_is_near_float64(mode, name, rotate):
    q, k, v = inputs(64)
    prologue = prologues(64)[name]
    out = torch.full_like(q, torch.nan)
    lse = torch.full(q.shape[:3], torch.nan)
    want, want_lse = out.clone(), lse.clone()
    call = (q, k, v, MODES[mode], None, False, 0.125)
    cut = backend.Cut(64, 128, 4, 1)
    backend.run_cut(out, lse, *call, cut, prologue, rotate)
    reference.run(want, want_lse, *call, prologue)
    error = (out.double() - want.double()).norm() / want.double().norm()
    assert error <= MODES[mode].max_error
    # One logit's, INT8 by INT8.
    assert (lse - want_lse).abs().max() <= 0.06


def unrotated(stored: torch.Tensor) -> torch.Tensor:
    """[..., W] times the Hadamard matrix, by its recursion."""
    stored = stored.double()
    width = stored.shape[-1]
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return stored @ matrix / width**0.5


@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_rotation_is_the_hadamard_matrix(d):
    q, k, v = (make(1, 1, 64, d, seed=i) for i in range(3))
    got = module.prepare(q, k, v, 1.0, MODES["exact"], 4, False, False, NOTHING, True)
    scale = (got.q_scale[0, :64, None] / module.LOG2E).double()
    # Half a step of each rotated channel is, turned back, a normal number of 0.29 steps.
    away = unrotated(got.q[0, 0, :64] * scale)[:, :d] - q[0, 0].double()
    assert (away.abs() <= 2 * scale).all() and (away / scale).square().mean() <= 0.09
    assert (got.q[0, 0, :64].abs().amax(1) == 127).all()


def test_rotation_halves_the_error_of_outlying_channels():
    q, k, v = (make(1, 1, 128, 128, seed=i) for i in range(3))
    for x in (q, k):
        x[..., ::37] *= 5
    errors = []
    want = torch.empty_like(q)
    reference.run(want, None, q, k, v, MODES["exact"], None, False, 0.09)
    for rotate in (False, True):
        out = torch.full_like(q, torch.nan)
        cut = backend.Cut(64, 64, 4, 1)
        backend.run_cut(
            *(out, None, q, k, v, MODES["exact"], None, False, 0.09, cut, NOTHING, rotate)
        )
        errors.append((out.double() - want.double()).norm())
    assert errors[1] <= 0.6 * errors[0]


def test_inputs_are_not_written_to():
    q, k, v = inputs(64)
    before = [x.clone() for x in (q, k, v)]
    module.prepare(q, k, v, 1.0, MODES["exact"], 1, False, True, prologues(64)["wan"], True)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
