"""The quantizers of activations on the GPU, against plain torch in float32."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.linear import linear, quantize_activation, share
from lowbit.ops.quantize_rows import (
    LIMITS,
    OP,
    Prologue,
    cuda,
    interleave,
    quantize_rows,
    reference,
    restore,
)
from lowbit.quant import formats

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
BACKENDS = sorted({b.name for b in registry.backends(OP)} - {"reference"})
WIDTHS = (256, 1792, 3072, 5120, 6144, 8960, 12288, 13824, 14336, 16384)
# Sums in another order, in TF32, move a value that lies between two codes to the other one.
MAX_MOVED = 0.05
# Dtype, rotated, interleaved.
WAYS = [(dtype, rotated, False) for dtype in LIMITS for rotated in (False, True)]
WAYS += [(FP8, False, True)]


def make(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def prologues(m: int, k: int, dtype: torch.dtype) -> dict[str, Prologue]:
    scale, shift = make(1, k, seed=1, dtype=dtype), make(m, 2 * k, seed=2)[:, k:]
    return {
        "none": Prologue(),
        "gelu": Prologue(activation="gelu_tanh"),
        "layer": Prologue("layer", scale=scale, shift=shift),
        "affine": Prologue("layer", 1e-5, make(k, seed=3), make(k, seed=4, dtype=dtype)),
        "rms": Prologue("rms", weight=make(k, seed=3), scale=scale, activation="gelu_tanh"),
    }


# Each is a kernel to compile, or four: every width once, every dtype at two.
CASES = [(torch.bfloat16, k) for k in WIDTHS]
CASES += [(dtype, k) for dtype in (torch.float16, torch.float32) for k in (1792, 5120)]


def check(x: torch.Tensor, prologue: Prologue, backend: str, exact: float = 2**-18) -> None:
    """Fail unless the rows are those of the reference, in all WAYS.

    exact: how much of the largest value the roundings of float32 may come to.
    """
    for stored_dtype, rotated, interleaved in WAYS:
        given = {"prologue": prologue, "interleaved": interleaved}
        stored, scale = quantize_rows(x, stored_dtype, rotated, backend, **given)
        stored = restore(stored) if interleaved else stored
        want, unit = reference.run(x, stored_dtype, rotated, prologue)
        # A rotation multiplies in TF32, twice: sums of 16 products of which each is rounded.
        loose = 2**-9 if rotated else exact
        torch.testing.assert_close(scale, unit, rtol=loose, atol=1e-37)
        got, want = stored.float(), want.float()
        # One code further at most, and seldom: a step is 1, or E4M3's 3 bits of mantissa.
        step = 1 if stored_dtype == torch.int8 else want.abs() * 2**-3 + 2**-9
        step = step + LIMITS[stored_dtype] * loose
        assert ((got - want).abs() <= step).all()
        assert (got != want).float().mean() <= (MAX_MOVED if rotated else MAX_MOVED / 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "k"), CASES, ids=str)
@pytest.mark.parametrize("name", ["none", "gelu", "layer", "affine", "rms"])
def test_rows_are_those_of_the_reference(dtype, k, name, backend):
    x = make(33, k, dtype=dtype) + 0.5
    x[5] = 0
    before = x.clone()
    check(x, prologues(33, k, dtype)[name], backend)
    assert torch.equal(x, before)


@pytest.mark.parametrize("m", [1, 65, 512, 1000, 1536])
@pytest.mark.parametrize("k", [256, 3072, 5120, 13824])
@pytest.mark.parametrize("static", [False, True])
def test_interleaved_rows_are_those_in_order_bit_for_bit(m, k, static):
    """Whatever number of warps has a row."""
    x = make(m, k, dtype=torch.bfloat16)
    x[m // 2, k // 3] = torch.inf
    given = torch.tensor(0.004, device="cuda") if static else None
    want, unit = quantize_rows(x, FP8, backend="triton", input_scale=given)
    want = interleave(want).view(torch.uint8)
    for backend in BACKENDS:
        got, scale = quantize_rows(x, FP8, backend=backend, input_scale=given, interleaved=True)
        assert torch.equal(got.view(torch.uint8), want) and torch.equal(scale, unit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1536, 3072, 5120])
@pytest.mark.parametrize("name", ["one", "two", "affine", "rms"])
def test_modulation_that_blocks_share_is_that_of_the_rows(dtype, k, name):
    m = 2 * (cuda.SHARED_ROWS * 160 + 1)
    given = {
        "one": Prologue("layer", scale=make(1, k, seed=1, dtype=dtype), shift=make(k, seed=2)),
        "two": Prologue("layer", scale=make(2, k, seed=1), shift=make(2, 2 * k, seed=2)[:, k:]),
        "affine": Prologue("layer", 1e-5, make(k, seed=3), make(k, seed=4, dtype=dtype)),
        "rms": Prologue("rms", weight=make(k, seed=3), activation="gelu_tanh"),
    }
    check(make(m, k, dtype=dtype) + 0.5, given[name], "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [5, 3000])
def test_norm_of_rows_far_from_zero_is_exact(m, backend):
    """Whose squares are nearly all mean: there a variance from sums of squares has few digits."""
    x = make(m, 3072)
    x[1::2] += torch.tensor([3.0, 8.0, 30.0, 100.0], device="cuda").repeat(m)[: m // 2, None]
    scale = make(1, 3072, seed=1) * 0.1
    for dtype in (torch.float32, torch.bfloat16):
        # 100 deviations are rounded to 24 bits and taken away again.
        check(x.to(dtype), Prologue("layer", scale=scale), backend, 2**-16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rotated", [False, True])
def test_static_scale_cuts_off_and_shows_what_is_not_finite(rotated, backend):
    x = make(9, 512, dtype=torch.bfloat16)
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    given = torch.tensor(0.004, device="cuda")
    stored, scale = quantize_rows(x, FP8, rotated, backend, input_scale=given)
    want, _ = reference.run(x, FP8, rotated, input_scale=given)
    assert scale.item() == given.item()
    bad = stored.float().isnan().any(1)
    assert bad.tolist() == [False, True, True] + [False] * 6
    # A rotation multiplies in TF32, to 2^-10 of the largest code.
    least = 2**-9 + (448 * 2**-10 if rotated else 0)
    near = torch.isclose(stored.float(), want.float(), rtol=2**-3, atol=least, equal_nan=True)
    assert near.all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", ["none", "layer"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_shows_a_token_that_is_not_finite(bad, rotated, name, backend):
    x = make(3, 5120, dtype=torch.bfloat16)
    x[1, 300] = bad
    prologue = prologues(3, 5120, torch.bfloat16)[name]
    _, scale = quantize_rows(x, torch.int8, rotated, backend, prologue=prologue)
    assert torch.isfinite(scale).flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_rowwise", "int8", "int8_convrot"])
def test_layers_that_share_an_activation_give_what_they_give_alone(name):
    weights = [formats.get(name).quantize(make(256, 512, seed=i) * 0.02) for i in range(3)]
    x = make(2, 70, 512, dtype=torch.bfloat16)
    alone = [linear(x, w, backend="triton") for w in weights]
    shared = quantize_activation(x, weights[0])
    together = [linear(shared, w, backend="triton") for w in weights]
    share(x, 3)
    announced = [linear(x, w, backend="triton") for w in weights]
    for a, b, c in zip(alone, together, announced, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8", "int8_convrot"])
def test_activation_before_the_layer_is_fused_with_the_quantizer(name):
    weight = formats.get(name).quantize(make(256, 512) * 0.02)
    x = make(70, 512, dtype=torch.bfloat16)
    got = linear(x, weight, backend="triton", input_act="gelu_tanh")
    gelu = torch.nn.functional.gelu(x.double(), approximate="tanh")
    want = gelu @ weight.dequantize().double().t()
    error = (got.double() - want).norm() / want.norm()
    # After GELU a few values are much larger than the others: twice the error of gaussian rows.
    assert error <= 2 * formats.get(name).max_error + torch.finfo(torch.bfloat16).eps


def test_quantizer_can_be_captured_in_a_graph_and_called_from_a_new_thread():
    x = make(70, 5120, dtype=torch.bfloat16)
    want = quantize_rows(x, torch.int8, True, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = quantize_rows(x, torch.int8, True, "cuda")
    for tensor in got:
        tensor.zero_()
    graph.replay()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(quantize_rows, x, torch.int8, True, "cuda").result()
    for tensors in (got, other):
        assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True))


def test_product_that_starts_early_waits_for_the_quantizer():
    """Launched while the quantizer runs, it would multiply what was in its memory before."""
    weight = formats.get("int8_convrot").quantize(make(256, 5120) * 0.02)
    inputs = [make(3000, 5120, seed=i, dtype=torch.bfloat16) for i in range(4)]
    want = []
    for x in inputs:
        rows = quantize_activation(x, weight)
        torch.cuda.synchronize()
        want.append(linear(rows, weight, backend="triton"))
    torch.cuda.synchronize()
    got = [linear(x, weight, backend="triton") for _ in range(10) for x in inputs]
    for i, out in enumerate(got):
        assert torch.equal(out, want[i % len(inputs)])
