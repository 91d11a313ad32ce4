"""Our kernels on the GPU: every scheme, size and dtype against float64."""

import pytest
import torch
import torch.nn.functional as F

from lowbit.ops import tuning
from lowbit.ops.linear import LowRank, linear
from lowbit.ops.quantize_rows import quantize_rows
from lowbit.ops.scaled_mm import scaled_mm
from lowbit.quant import formats

NAMES = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3_rowwise", "int8", "int8_convrot")
# The format whose round trip has the error of the activation, which is E4M3 for every FP8 weight.
ROUNDS_LIKE = {"fp8_e5m2": "fp8_e4m3_rowwise", "fp8_e4m3": "fp8_e4m3_rowwise"}
N, K = 1040, 1280


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.fixture(params=NAMES)
def weight(request):
    return formats.get(request.param).quantize(make(N, K) * 0.02)


def bound(weight, dtype: torch.dtype) -> float:
    """Relative L2 error at most: the rounding of the activation, and of the result."""
    name = formats.of(weight).name
    rounding = formats.get(ROUNDS_LIKE.get(name, name)).max_error
    # Hopper adds FP8 products with some 14 bits.
    return rounding + torch.finfo(dtype).eps + 2**-10


def want_of(x, weight, bias=None) -> torch.Tensor:
    bias = None if bias is None else bias.double()
    return F.linear(x.double(), weight.dequantize().double(), bias)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 63, 512, 1000, 32760])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
def test_product_is_near_float64(weight, tokens, dtype, biased):
    x = make(tokens, K, seed=1).to(dtype)
    bias = make(N, seed=2).to(dtype) if biased else None
    before = x.clone()
    got = linear(x, weight, bias, backend="triton")
    assert (got.shape, got.dtype) == ((tokens, N), dtype)
    assert torch.equal(x, before)
    if tokens:
        assert error(got, want_of(x, weight, bias)) <= bound(weight, dtype)


@pytest.mark.parametrize(
    ("n", "k"), [(5, 256), (17, 512), (13824, 5120), (3072, 13824), (64, 16384)]
)
@pytest.mark.parametrize("name", ["fp8_e4m3_rowwise", "int8_convrot"])
def test_shape_of_the_weight_does_not_matter(n, k, name):
    weight = formats.get(name).quantize(make(n, k) * 0.02)
    for tokens in (3, 100, 2000):
        x = make(tokens, k, seed=1).bfloat16()
        assert error(linear(x, weight, backend="triton"), want_of(x, weight)) <= bound(
            weight, x.dtype
        )


def test_strides_of_the_input_do_not_matter(weight):
    x = make(60, K, seed=1).bfloat16()
    wide = torch.full((60, 2 * K), torch.nan, device="cuda", dtype=x.dtype)
    wide[:, ::2] = x
    tall = torch.full((180, K + 8), torch.nan, device="cuda", dtype=x.dtype)
    tall[::3, 3 : K + 3] = x
    want = linear(x, weight, backend="triton")
    views = (wide[:, ::2], tall[::3, 3 : K + 3], x.t().contiguous().t())
    for view in views:
        assert torch.equal(linear(view, weight, backend="triton"), want)
    swapped = x.reshape(4, 15, K).transpose(0, 1)
    got = linear(swapped, weight, backend="triton")
    assert torch.equal(got, want.reshape(4, 15, N).transpose(0, 1))


@pytest.mark.parametrize("tokens", [40, 700])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_token_and_no_other(weight, bad, tokens):
    x = make(tokens, K, seed=1).bfloat16()
    clean = linear(x, weight, backend="triton")
    x[7, 300] = bad
    got = linear(x, weight, backend="triton")
    assert not torch.isfinite(got[7]).any()
    got[7] = clean[7]
    assert torch.equal(got, clean)


def test_zero_tokens_give_the_bias(weight):
    bias = make(N).bfloat16()
    got = linear(torch.zeros(33, K, device="cuda", dtype=torch.bfloat16), weight, bias, "triton")
    assert torch.equal(got, bias.expand(33, -1))


def test_tokens_of_very_different_norm_keep_their_precision(weight):
    x = make(512, K, seed=1).bfloat16()
    x[::2] *= 2.0**-20
    got, want = linear(x, weight, backend="triton"), want_of(x, weight)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        assert error(got[part], want[part]) <= bound(weight, x.dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("k", [16, 1000, 1536, 5120, 14336, 16384])
@pytest.mark.parametrize("tokens", [100, 600])
def test_rows_are_those_of_the_reference(dtype, k, tokens):
    x = make(tokens, k).bfloat16()
    x[3] = 0
    got = quantize_rows(x, dtype, backend="triton")
    # On the CPU: on a GPU, torch divides by a constant less exactly.
    want = quantize_rows(x.cpu(), dtype, backend="reference")
    assert torch.equal(got[0].cpu().view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(got[1].cpu(), want[1])


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [256, 1536, 5120, 14336, 16384])
@pytest.mark.parametrize("tokens", [100, 600])
def test_rotated_rows_are_near_those_of_the_reference(source, k, tokens):
    x = make(tokens, k).to(source)
    x[:, ::97] *= 30
    got, want = (quantize_rows(x, torch.int8, True, name) for name in ("triton", "reference"))
    torch.testing.assert_close(got[1], want[1], rtol=2**-9, atol=0)
    assert (got[0].int() - want[0].int()).abs().max() <= 1
    # One step is 2^7 of TF32's: values that close to half a step go the other way.
    assert (got[0] != want[0]).float().mean() <= 2**-5


def test_int8_sums_are_exact_with_a_zero_point():
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (
        torch.randint(-128, 128, (m, 512), generator=generator, device="cuda", dtype=torch.int8)
        for m in (300, 272)
    )
    zero_point = torch.arange(-150, 150, device="cuda", dtype=torch.int32)
    total = b.sum(1, dtype=torch.int32)
    one = torch.ones(1, device="cuda")
    got = scaled_mm(
        a, b, one, one, zero_point=zero_point, column_sum=total, out_dtype=torch.float32
    )
    want = (a.double() - zero_point[:, None]) @ b.double().t()
    assert torch.equal(got.double(), want)


def test_weight_that_starts_anywhere_is_read_right():
    a, storage = make(200, 256).to(torch.int8), make(256 * 65).mul(40).to(torch.int8)
    b, one = storage[1 : 1 + 256 * 64].reshape(64, 256), torch.ones(1, device="cuda")
    got = scaled_mm(a, b, one, one, out_dtype=torch.float32)
    assert torch.equal(got.double(), a.double() @ b.double().t())


@pytest.mark.parametrize("name", NAMES)
def test_compiled_stack_is_one_graph(name):
    """Three layers through F.linear: no breaks, and no recompilation for another weight."""
    weights = [formats.get(name).quantize((make(K, K, seed=i) * 0.02).bfloat16()) for i in range(4)]
    torch._dynamo.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    @torch.compile(fullgraph=True, backend=count)
    def run(x, first, second, third):
        for weight in (first, second, third):
            x = F.gelu(F.linear(x, weight))
        return x

    x = make(100, K).bfloat16()
    with torch.inference_mode():
        got = run(x, *weights[:3])
        run(x, *weights[1:])
        want = x
        for weight in weights[:3]:
            want = F.gelu(F.linear(want, weight))
    assert len(graphs) == 1
    assert torch.equal(got, want)


def test_compiled_operations_are_one_graph():
    weight = formats.get("int8_convrot").quantize((make(N, K) * 0.02).bfloat16())
    stored, scale = weight._qdata, weight._params.scale

    def run(x):
        rows, row_scale = quantize_rows(F.silu(x), torch.int8, rotate=True)
        return scaled_mm(rows, stored, row_scale, scale) + 1

    x = make(100, K).bfloat16()
    got = torch.compile(run, fullgraph=True)(x)
    # The compiler computes silu in float32 throughout.
    assert error(got, run(x).double()) <= 2**-7


@pytest.mark.parametrize("gates", [1, 2, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 32])
def test_gate_and_residual_join_the_product(weight, gates, dtype, rank):
    x, residual = make(2, 350, K, seed=1).to(dtype), make(2, 350, N, seed=2).to(dtype)
    gate, bias = make(gates, N, seed=3).to(dtype), make(N, seed=4).to(dtype)
    term = None
    plain = want_of(x.view(-1, K), weight, bias)
    if rank:
        down, up = make(rank, K, seed=5) * K**-0.5, make(N, rank, seed=6) * 0.1
        factor = torch.ones(rank, device="cuda")
        term = LowRank(down.to(dtype), up.to(dtype), factor)
        plain += x.view(-1, K).double() @ (up.to(dtype).double() @ down.to(dtype).double()).t()
    got = linear(x, weight, bias, low_rank=term, gate=gate, residual=residual)
    gated = plain * gate.double().repeat_interleave(700 // gates, 0)
    want = (residual.view(-1, N).double() + gated).view(2, 350, N)
    # Of what is gated; the residual is exact.
    scale = (gated.norm() / want.norm()).item()
    assert error(got, want) <= bound(weight, dtype) * scale + torch.finfo(dtype).eps


# Few rows, and many: other kernels, where the GPU has them.
@pytest.mark.parametrize("tokens", [96, 4352])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_product_that_was_prepared_before_gives_the_same_bits(name, gated, tokens):
    def given(seed: int) -> tuple:
        weight = formats.get(name).quantize(make(3072, K, seed=seed) * 0.02)
        bias, gate = (make(n, 3072, seed=seed + n).bfloat16() for n in (1, 2))
        x, residual = (make(tokens, n, seed=seed + n).bfloat16() for n in (K, 3072))
        return x, weight, bias[0], *((gate, residual) if gated else (None, None))

    def product(x, weight, bias, gate, residual) -> torch.Tensor:
        return linear(x, weight, bias, gate=gate, residual=residual)

    calls = [given(seed) for seed in (0, 10, 20)]
    # As in a model: the others while the first is still at work.
    found = [product(*call) for call in calls]
    for call, got in zip(calls, found, strict=True):
        tuning.forget()
        assert torch.equal(got, product(*call))
