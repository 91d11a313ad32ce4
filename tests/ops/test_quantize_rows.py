"""`quantize_rows`: rounding per token, the rotation, and what it refuses."""

import pytest
import torch
from comfy_kitchen.tensor.int8_utils import _build_hadamard

from lowbit.ops import registry
from lowbit.ops.launch import TRITON_MIN
from lowbit.ops.quantize_rows import LIMITS, OP, Prologue, quantize_rows
from lowbit.ops.quantize_rows.triton import K_MAX, cover, warps_of

DTYPES = tuple(LIMITS)
TINY = torch.finfo(torch.float32).tiny
# Half a step of the largest code (INT8); half a step of E4M3's 3-bit mantissa.
MAX_RELATIVE = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2**-4}


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (63, 100), (17, 1000)], ids=str)
def test_values_are_kept_to_half_a_step(dtype, source, shape):
    x = make(*shape, dtype=source)
    stored, scale = quantize_rows(x, dtype)
    assert (stored.dtype, stored.shape, scale.shape) == (dtype, x.shape, (shape[0], 1))
    largest = x.float().abs().amax(1, keepdim=True)
    assert torch.equal(scale, largest / LIMITS[dtype])
    step = largest if dtype == torch.int8 else x.float().abs().clamp_min(largest * 2**-14)
    # A little more, for the roundings of scale and reciprocal.
    assert ((stored.float() * scale - x.float()).abs() <= step * MAX_RELATIVE[dtype] * 1.001).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_that_of_the_weights(dtype):
    """The same matrix on both sides of a product cancels out."""
    x, w = make(9, 512), make(5, 512, seed=1)
    stored, scale = quantize_rows(x, dtype, rotate=True)
    matrix = _build_hadamard(256)
    rotated = (w.reshape(-1, 256) @ matrix.t()).reshape(w.shape)
    want = x @ w.t()
    error = (stored.float() * scale @ rotated.t() - want).norm() / want.norm()
    # The relative RMS error of a gaussian row, a fifth above what is expected.
    assert error < (0.012 if dtype == torch.int8 else 0.032)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate", [True, False])
def test_zero_tokens_give_zeros(dtype, rotate):
    x = make(3, 256)
    x[1] = 0
    stored, scale = quantize_rows(x, dtype, rotate)
    assert (stored[1].float() == 0).all()
    assert scale[1] == TINY


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate", [True, False])
def test_scale_shows_a_token_that_is_not_finite(bad, dtype, rotate):
    x = make(3, 512)
    clean = quantize_rows(x, dtype, rotate)[1]
    x[1, 300] = bad
    scale = quantize_rows(x, dtype, rotate)[1]
    assert not torch.isfinite(scale[1])
    assert torch.equal(scale[::2], clean[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_tokens_keep_their_digits(dtype):
    x = make(1, 64) * torch.tensor([[1e-30], [1.0], [1e30]])
    stored, _ = quantize_rows(x, dtype)
    assert torch.equal(stored[0].float(), stored[1].float())
    assert torch.equal(stored[2].float(), stored[1].float())


def test_halves_go_to_the_even_neighbour():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_rows(x, torch.int8)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_empty_input_gives_empty_output(shape):
    stored, scale = quantize_rows(make(*shape), torch.int8, rotate=True)
    assert (stored.shape, scale.shape) == (shape, (shape[0], 1))


def test_strides_do_not_matter_and_the_input_is_kept():
    x = make(256, 12).t()
    before = x.clone()
    for got, want in zip(
        quantize_rows(x, torch.int8, True), quantize_rows(before, torch.int8, True), strict=True
    ):
        assert torch.equal(got, want)
        assert got.is_contiguous()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("kind", "x", "dtype", "rotate", "message"),
    [
        (TypeError, make(2, 16), torch.float8_e5m2, False, "to torch.float8_e5m2; torch.int8 and"),
        (TypeError, make(2, 16).double(), torch.int8, False, "x is torch.float64; cast it"),
        (ValueError, make(2, 2, 16), torch.int8, False, r"x is \[2, 2, 16\]; flatten"),
        (ValueError, make(2, 128), torch.int8, True, "K=128 is not a multiple of 256.*choose"),
    ],
)
def test_what_does_not_fit_is_named(kind, x, dtype, rotate, message):
    with pytest.raises(kind, match=message):
        quantize_rows(x, dtype, rotate)


def test_too_wide_a_row_is_a_reason_and_no_crash(monkeypatch):
    monkeypatch.setattr(registry, "capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "_has_package", lambda name: True)
    monkeypatch.setattr(registry, "_version", lambda name: TRITON_MIN)
    triton = next(b for b in registry.backends(OP) if b.name == "triton")
    device = torch.device("cuda", 0)
    assert registry.unmet(triton.needs, registry.Call("int8", device, 0, K_MAX)) is None
    call = registry.Call("int8", device, 0, K_MAX + 1)
    assert registry.unmet(triton.needs, call) == f"K={K_MAX + 1} is above {K_MAX}"


def test_pieces_cover_every_row_without_much_waste():
    for k in range(1, K_MAX + 1, 37):
        covered = 256 * sum(cover(k)[1])
        assert k <= covered <= max(1.25 * k, k + 255)
        assert all(size & (size - 1) == 0 for size in cover(k)[1])
    for capability in (None, (8, 0), (9, 0)):
        assert warps_of(capability, K_MAX, rotated=True, prepared=True) >= 4


def test_operation_is_one_step_of_a_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        stored, scale = quantize_rows(x, torch.int8, rotate=True)
        return stored.float() * scale

    x = make(5, 256)
    stored, scale = quantize_rows(x, torch.int8, rotate=True)
    assert torch.equal(run(x), stored.float() * scale)


def test_static_scale_comes_back_and_is_not_hidden():
    x, scale = make(3, 16), torch.tensor(0.5)
    x[1, 2] = torch.inf
    for rows in (x, x[:0]):
        stored, got = quantize_rows(rows, torch.float8_e4m3fn, input_scale=scale)
        assert got.item() == 0.5
        assert stored.shape == rows.shape
    stored, _ = quantize_rows(x, torch.float8_e4m3fn, input_scale=scale)
    assert stored.float().isnan().any(1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="is for FP8"):
        quantize_rows(x, torch.int8, input_scale=scale)


@pytest.mark.parametrize(
    ("prologue", "kind", "message"),
    [
        (Prologue("batch"), ValueError, "norm is 'batch'"),
        (Prologue(activation="silu"), ValueError, "activation is 'silu'"),
        (Prologue(weight=torch.ones(5)), ValueError, r"weight is \[5\]; \[16\] is wanted"),
        (Prologue(scale=torch.ones(2, 16)), ValueError, "2 rows, which do not divide 3 tokens"),
        (Prologue(shift=torch.ones(16, dtype=torch.int32)), TypeError, "shift is torch.int32"),
        (Prologue(bias=torch.ones(16, device="meta")), ValueError, "bias is on meta, x on cpu"),
    ],
)
def test_prologue_that_does_not_fit_is_named(prologue, kind, message):
    with pytest.raises(kind, match=message):
        quantize_rows(make(3, 16), torch.int8, prologue=prologue)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_prologue_is_what_torch_does_in_steps(rows):
    x, scale, shift = make(6, 64), make(rows, 64, seed=1), make(rows, 64, seed=2)
    prologue = Prologue("layer", 1e-5, scale=scale, shift=shift, activation="gelu_tanh")
    stored, step = quantize_rows(x, torch.int8, prologue=prologue)
    norm = torch.nn.functional.layer_norm(x, (64,), eps=1e-5).reshape(rows, -1, 64)
    want = (norm * (1 + scale[:, None]) + shift[:, None]).reshape(6, 64)
    want = torch.nn.functional.gelu(want, approximate="tanh")
    assert ((stored * step - want).abs() <= step * 0.501).all()
