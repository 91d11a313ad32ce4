"""What follows the sums of `scaled_mm`, in every combination, and scales of blocks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.ops.scaled_mm import scaled_mm
from lowbit.ops.scaled_mm.check import BLOCK

FP8 = torch.float8_e4m3fn
M, N, K = 12, 9, 48
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


def integers(*shape: int, seed: int = 0, most: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most, shape, generator=generator)


def powers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Powers of two, by which every product is exact."""
    return 2.0 ** integers(*shape, seed=seed, most=3)


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


EVERY = list(itertools.product([False, True], [False, True], [0, 1, 3, M], [False, True]))


@pytest.mark.parametrize(("point", "biased", "gates", "kept"), EVERY)
def test_every_combination_is_exact_in_integers(point, biased, gates, kept):
    """Scales and gates are powers of two, the rest integers: float32 rounds none of it."""
    a, b = integers(M, K, most=8), integers(N, K, seed=1, most=8)
    total, zero_point = a @ b.t(), torch.arange(M) - 5
    scale_a, scale_b = powers(M, 1), powers(N, 1, seed=1)
    bias = integers(N, seed=2).float() if biased else None
    gate = powers(gates, N, seed=3) if gates else None
    residual = integers(M, N, seed=4).half() if kept else None
    want = (total - zero_point[:, None] * b.sum(1) if point else total).double()
    want = want * scale_a * scale_b.t() + (bias if biased else 0)
    for row in range(M if gates else 0):
        want[row] *= gate[row // (M // gates)]
    want = want + (residual if kept else 0)
    got = scaled_mm(
        a.to(torch.int8),
        b.to(torch.int8),
        scale_a,
        scale_b,
        bias,
        zero_point=zero_point.int() if point else None,
        column_sum=b.sum(1).int() if point else None,
        gate=gate,
        residual=residual,
        out_dtype=torch.float32,
    )
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("gates", [0, 1, 3, M])
@pytest.mark.parametrize("kept", [None, torch.bfloat16, torch.float16, torch.float32])
def test_activation_comes_after_the_bias_and_before_gate_and_residual(gates, kept):
    a, b = integers(M, K).to(torch.int8), integers(N, K, seed=1).to(torch.int8)
    scales = (floats(M, 1).abs() * 1e-2, floats(N, 1, seed=1).abs() * 1e-2)
    bias, gate = floats(N, seed=2), floats(gates, N, seed=3) if gates else None
    residual = None if kept is None else floats(M, N, seed=4).to(kept)
    value = scaled_mm(a, b, *scales, bias, out_dtype=torch.float32)
    want = F.gelu(value.double(), approximate="tanh")
    if gates:
        want = want.reshape(gates, -1, N) * gate.double()[:, None]
    want = want.reshape(M, N) + (0 if kept is None else residual.double())
    rest = {"activation": "gelu_tanh", "gate": gate, "residual": residual}
    got = scaled_mm(a, b, *scales, bias, **rest, out_dtype=torch.float32)
    # A few roundings to float32, of values as large as the largest.
    limit = 4 * torch.finfo(torch.float32).eps * want.abs().max()
    assert (got.double() - want).abs().max() <= limit


@pytest.mark.parametrize("out_dtype", OUTPUTS)
def test_all_of_it_is_rounded_once(out_dtype):
    a, b = integers(M, K).to(torch.int8), integers(N, K, seed=1).to(torch.int8)
    one = torch.tensor(1e-3)
    rest = {
        "activation": "gelu_tanh",
        "gate": floats(2, N).to(torch.float16),
        "residual": floats(M, N).bfloat16(),
    }
    full = scaled_mm(a, b, one, one, **rest, out_dtype=torch.float32)
    assert torch.equal(scaled_mm(a, b, one, one, **rest, out_dtype=out_dtype), full.to(out_dtype))


def test_what_is_given_is_never_written_to():
    given = {
        "a": integers(M, K).to(torch.int8),
        "b": integers(N, K, seed=1).to(torch.int8),
        "scale_a": floats(M, 1),
        "scale_b": floats(N, 1),
        "bias": floats(N),
        "gate": floats(3, N),
        "residual": floats(M, N),
    }
    before = {name: x.clone() for name, x in given.items()}
    scaled_mm(**given, activation="gelu_tanh", out_dtype=torch.float32)
    assert all(torch.equal(x, before[name]) for name, x in given.items())


def test_no_tokens_take_any_gate():
    a, b = torch.zeros(0, K, dtype=torch.int8), torch.zeros(N, K, dtype=torch.int8)
    for rows in (0, 1, 7):
        rest = {"gate": floats(rows, N), "residual": floats(0, N), "activation": "gelu_tanh"}
        assert scaled_mm(a, b, torch.ones(1), torch.ones(1), **rest).shape == (0, N)


def spread(scale: torch.Tensor, rows: int, n: int, k: int) -> torch.Tensor:
    """One scale per value, of one per `rows` rows and BLOCK columns."""
    return scale.repeat_interleave(rows, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k].double()


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 300),
    k=st.integers(1, 30),
    integer=st.booleans(),
    seed=st.integers(0, 2**20),
    aside=st.booleans(),
)
def test_scales_of_blocks_are_those_of_their_values(m, n, k, integer, seed, aside):
    """Against float64, of the values that the scales stand for; the last blocks may be short."""
    k *= 16
    a, b = (floats(rows, k, seed=seed + rows) * 30 for rows in (m, n))
    a, b = (x.to(torch.int8 if integer else FP8) for x in (a, b))
    columns = -(-k // BLOCK)
    scale_a = floats(columns, m, seed=seed).abs().t()
    scale_a = scale_a if aside else scale_a.contiguous()
    scale_b = floats(-(-n // BLOCK), columns, seed=seed + 1).abs()
    values = a.double() * spread(scale_a, 1, m, k), b.double() * spread(scale_b, BLOCK, n, k)
    want = values[0] @ values[1].t()
    got = scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.float32)
    limit = torch.finfo(torch.float32).eps * (values[0].abs() @ values[1].abs().t())
    assert ((got.double() - want).abs() <= limit).all()


def test_blocks_of_a_width_that_is_one_block_are_rows():
    """Then a scale per block of b is one for all of it, or one for each BLOCK of its rows."""
    a, b = integers(5, 64).to(torch.int8), integers(200, 64, seed=1).to(torch.int8)
    scale_a, scale_b = powers(5, 1), powers(2, 1, seed=2)
    want = (a.double() @ b.double().t()) * scale_a * spread(scale_b, BLOCK, 200, 1).t()
    got = scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.float32)
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scale_of_a_block_that_is_not_finite_shows(bad):
    a, b = integers(5, 256).to(torch.int8), integers(7, 256, seed=1).to(torch.int8)
    scale_a = torch.ones(5, 2)
    scale_a[3, 1] = bad
    got = scaled_mm(a, b, scale_a, torch.ones(1, 2), activation="gelu_tanh")
    assert torch.isfinite(got).all(1).tolist() == [True, True, True, False, True]
