"""4-bit weights on the GPU: decoders bit for bit, products against float64."""

import gc

import pytest
import torch
import torch.nn.functional as F

from lowbit.ops import registry
from lowbit.ops.decode_fp4 import reference as decode_reference
from lowbit.ops.decode_fp4 import triton as decode_triton
from lowbit.ops.fp4_mm import fp4_mm
from lowbit.ops.fp4_scaled_mm import hopper, prefers_interleaved
from lowbit.ops.fp4_scaled_mm import reference as product_reference
from lowbit.ops.fp4_scaled_mm.tiles import Tile
from lowbit.ops.linear import linear, quantize_activation, release, share, with_arithmetic
from lowbit.ops.linear.activation import Kind
from lowbit.ops.linear.arithmetic import arithmetic_of
from lowbit.ops.linear.eight_bits import eight_bit_errors
from lowbit.ops.linear.four_bit import FEW_ROWS, GROUPS, four_bit
from lowbit.ops.mxfp4_mm import reference as mxfp4_reference
from lowbit.ops.mxfp4_mm import triton as mxfp4_triton
from lowbit.ops.quantize_rows import interleave, quantize_rows, restore
from lowbit.ops.scaled_mm import scaled_mm
from lowbit.quant import formats

NAMES = [name for name in formats.names() if formats.get(name).layout.scheme in GROUPS]
E4M3 = torch.float8_e4m3fn
N, K = 1040, 1280
INTERLEAVED = Kind(E4M3, 0, True)
KIND_ERROR = {Kind(E4M3, 0): 0.03, INTERLEAVED: 0.03, Kind(torch.int8, 256): 0.015}
# One of each number of warpgroups, with and without rows that share a block of scales; then those
# that two blocks have together, and those that two warpgroups do.
PRODUCT_TILES = (
    *(Tile(1, 64), Tile(1, 256), Tile(2, 96), Tile(2, 256), Tile(3, 128), Tile(3, 192)),
    *(Tile(1, 64, 2), Tile(1, 256, 2), Tile(2, 96, 2), Tile(2, 256, 2), Tile(3, 192, 2)),
    *(Tile(1, t, turns=2) for t in (64, 96, 192, 256)),
)


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def weight_of(name: str, n: int = N, k: int = K, seed: int = 1):
    return formats.get(name).quantize(make(n, k, seed=seed) * 0.02)


def exact(x, weight, bias=None) -> torch.Tensor:
    bias = None if bias is None else bias.double()
    return F.linear(x.double(), weight.dequantize().double(), bias)


def raw(n: int, k: int, group: int):
    """Random codes and scales, every one of them; padding is poisoned. MXFP4's in a narrow range"""
    generator = torch.Generator("cuda").manual_seed(n + k)
    columns = -(-k // group) * group
    wide = -(-(columns // group) // 4)
    shape = ((n, columns // 2), (-(-n // 128) * wide * 512,))
    low, high = (0, 127) if group == 16 else (100, 140)
    packed, scale = (
        torch.randint(a, b, s, generator=generator, device="cuda").to(torch.uint8)
        for a, b, s in zip((0, low), (256, high), shape, strict=True)
    )
    return packed, scale


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 64), (5, 250), (128, 512), (300, 1088), (1040, 13824), (3072, 3072)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, E4M3])
def test_decoder_is_the_reference_bit_for_bit(group, n, k, dtype):
    tensor_scale = torch.tensor(0.37, device="cuda")
    arguments = (*raw(n, k, group), tensor_scale, n, k, group, dtype)
    got, rows = decode_triton.run(*arguments)
    want, want_rows = decode_reference.run(*arguments)
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(got.view(as_bits), want.view(as_bits))
    assert (rows is None and want_rows is None) or torch.equal(rows, want_rows)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 16), (17, 40), (48, 80), (5, 250)])
def test_weight_of_any_size_is_that_of_a_cpu_again_and_again(n, k):
    """comfy-kitchen's kernel writes beyond the end of weights that fill no block of threads."""
    fmt = formats.get("nvfp4")
    for seed in range(20):
        weight = fmt.quantize(make(n, k, seed=seed) * 0.02)
        want = weight.to("cpu").dequantize()
        assert want.any()
        for _ in range(3):
            assert torch.equal(weight.dequantize().cpu(), want)


@pytest.mark.parametrize("group", [16, 32])
def test_scale_of_nan_is_nan(group):
    packed, scale = raw(256, 512, group)
    scale[:] = 0x38 if group == 16 else 127
    scale[5] = 0x7F if group == 16 else 0xFF
    for dtype in (torch.bfloat16, torch.float16, E4M3):
        got, want = (
            run.run(packed, scale, None, 256, 512, group, dtype)[0].float()
            for run in (decode_triton, decode_reference)
        )
        assert torch.isnan(got).sum() == group
        assert torch.equal(torch.isnan(got), torch.isnan(want))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["w4a16", "w4a8_fp8", "w4a8_int8"])
@pytest.mark.parametrize("k", [1160, 1280])
def test_what_lies_in_the_padding_of_scales_shows_nowhere(name, backend, k):
    """As files of other programs may have it: NaN in rows and columns that are of no block."""
    weight = weight_of(name, 200, k)
    w = four_bit(weight)
    scale = w.scale.view(torch.uint8).reshape(-1)
    places = torch.arange(scale.numel(), device="cuda")
    columns = scale.numel() // 256
    real = decode_reference.unswizzle(places, 200, columns)[:, : -(-k // w.group)]
    kept = scale[real].clone()
    clean = [linear(make(m, k).bfloat16(), weight, backend=backend) for m in (1, 100, 300)]
    scale.fill_(0x7F if w.group == 16 else 0xFF)
    scale[real] = kept
    for m, want in zip((1, 100, 300), clean, strict=True):
        assert torch.equal(linear(make(m, k).bfloat16(), weight, backend=backend), want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 63, 64, 65, 128, 129, 512, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
def test_w4a16_is_float64_rounded_once(name, tokens, dtype, biased):
    x, weight = make(tokens, K, seed=2).to(dtype), weight_of(name)
    bias = make(N, seed=3).to(dtype) if biased else None
    before = x.clone()
    got = linear(x, weight, bias, "w4a16")
    assert (got.shape, got.dtype) == ((tokens, N), dtype)
    assert torch.equal(x, before)
    if tokens:
        want = exact(x, weight, bias)
        # One rounding, and sums of K products in float32.
        assert error(got, want) <= torch.finfo(dtype).eps / 3 + 4e-6
        limit = torch.finfo(dtype).eps * want.abs() + 2e-5 * want.abs().max()
        assert ((got.double() - want).abs() <= limit).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["w4a16", "w4a8"])
@pytest.mark.parametrize(
    ("n", "k"), [(5, 250), (17, 40), (1, 1), (13824, 5120), (3072, 13824), (129, 16384)]
)
def test_shape_of_the_weight_does_not_matter(name, backend, n, k):
    weight = weight_of(name, n, k)
    w = four_bit(weight)
    held = [t for t in (w.packed, w.scale.view(torch.uint8), w.tensor_scale) if t is not None]
    before = [t.clone() for t in held]
    values = weight.dequantize().double()
    for tokens in (3, 100, 300):
        x = make(tokens, k, seed=2).bfloat16()
        want = F.linear(x.double(), values)
        got = linear(x, weight, backend=backend)
        assert all(torch.equal(t, b) for t, b in zip(held, before, strict=True))
        # A single product has the error of two E4M3 values at its worst.
        # Of a few dozen numbers the error is that of a small sample.
        bound = 0.13 if k == 1 else 0.05 if got.numel() < 100 else 0.034
        bound = 0.004 if backend == "w4a16" else bound
        assert error(got, want) <= bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 63, 512, 5000])
@pytest.mark.parametrize("kind", KIND_ERROR, ids=str)
def test_w4a8_errs_as_the_activation_and_the_new_weight_do(name, tokens, kind):
    x, weight, bias = make(tokens, K, seed=2).bfloat16(), weight_of(name), make(N, seed=3)
    got = linear(quantize_activation(x, weight, kind=kind), weight, bias, "w4a8")
    assert error(got, exact(x, weight, bias)) <= KIND_ERROR[kind] + 2**-8
    chosen = Kind(E4M3, 0, prefers_interleaved(weight.layout_cls.scheme, x.device, N, K, tokens))
    if kind == chosen:
        assert torch.equal(got, linear(x, weight, bias, "w4a8"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [16, 1000])
def test_kind_of_8_bits_that_is_asked_for_is_what_runs(name, tokens):
    x, weight = make(tokens, K, seed=2).bfloat16(), weight_of(name)
    results = {}
    interleaved = prefers_interleaved(weight.layout_cls.scheme, x.device, N, K, tokens)
    kinds = {"w4a8_fp8": Kind(E4M3, 0, interleaved), "w4a8_int8": Kind(torch.int8, 256)}
    for wish, kind in kinds.items():
        results[wish] = F.linear(x, with_arithmetic(weight, wish))
        rounded = quantize_activation(x, weight, kind=kind)
        assert torch.equal(results[wish], linear(rounded, weight, backend="w4a8"))
    want = exact(x, weight)
    least = min(results, key=lambda wish: error(results[wish], want))
    chosen = with_arithmetic(weight, "w4a8_exact")
    assert arithmetic_of(chosen) == least == "w4a8_int8"
    assert torch.equal(F.linear(x, chosen), results[least])


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_both_kinds_are_those_of_a_cpu(name):
    weight = weight_of(name)
    here, there = eight_bit_errors(weight), eight_bit_errors(weight.to("cpu"))
    assert here == pytest.approx(there, rel=0.01, abs=1e-9)
    assert eight_bit_errors(weight.to("cpu"), torch.device("cuda", 0)) == here


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="Triton emulates block-scaled products from Hopper on",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1040, 1280), (300, 130, 250), (129, 1, 40)])
def test_product_of_two_mxfp4_is_that_of_the_reference(tokens, n, k, dtype):
    """By the kernel itself, which on Hopper Triton emulates: `linear` would refuse it there."""
    x, weight, bias = make(tokens, k, seed=2).to(dtype), weight_of("mxfp4", n, k), make(n, seed=3)
    w = four_bit(weight)
    scale = w.scale.view(torch.uint8)
    for given in (bias, None):
        got = mxfp4_triton.run(x, w.packed, scale, given, n)
        want = mxfp4_reference.run(x, w.packed, scale, given, n)
        assert (got.shape, got.dtype) == (want.shape, dtype)
        # Of blocks that either scale serves nearly as well, another may be taken.
        assert error(got, want) <= 0.01
    packed, of_x = mxfp4_triton.quantize(x, 2 * w.packed.shape[1])
    wanted, scales = mxfp4_reference.quantize(x, 2 * w.packed.shape[1])
    same = of_x == scales
    assert same.float().mean() > 0.99
    assert torch.equal(packed[same.repeat_interleave(16, 1)], wanted[same.repeat_interleave(16, 1)])


hopper_only = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is for Hopper",
)


@hopper_only
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("tile", PRODUCT_TILES, ids=str)
def test_weight_that_is_decoded_in_registers_is_the_decoders_bit_for_bit(group, tile):
    """The product with the unit matrix, of rows and tokens that end within a tile."""
    n, k = 328, 384
    packed, scale = raw(n, k, group)
    tensor_scale = torch.tensor([0.37], device="cuda")
    eye, one = interleave(torch.eye(k, device="cuda")).to(E4M3), torch.ones(k, 1, device="cuda")
    weight = (packed, scale, tensor_scale)
    got = hopper.run_tile(eye, one, *weight, None, n, group, torch.float32, tile)
    stored, rows = decode_triton.run(*weight, n, k, group, E4M3)
    assert torch.equal(got, (stored.float() * rows).t())


@hopper_only
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        *((1, 8, 128), (65, 5120, 5120), (100, 1040, 1280), (300, 13824, 5120), (512, 3072, 12288)),
        *((512, 5120, 13824), (1000, 3072, 3072), (1500, 3080, 1536), (70, 40, 16384)),
    ],
)
def test_interleaved_product_errs_as_the_one_in_order(name, m, n, k):
    x, w = make(m, k).bfloat16(), four_bit(weight_of(name, n, k))
    x[:, ::97] *= 10
    rows, scale = quantize_rows(x, E4M3, interleaved=True)
    weight = (w.packed, w.scale.view(torch.uint8), w.tensor_scale)
    decoded = decode_triton.run(*weight, n, k, w.group, E4M3)
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if n < 2000 else (torch.bfloat16,):
        bias = make(n, seed=3).to(dtype)
        operands = (rows, scale, *weight, bias, n, w.group)
        want = product_reference.run(*operands, torch.float32)
        other = scaled_mm(restore(rows), decoded[0], scale, decoded[1], bias, out_dtype=dtype)
        got = hopper.run(*operands, dtype)
        assert got.dtype == dtype
        # The tensor cores cut sums off some 13 bits below their largest term, and what that is
        # depends on the order of the columns; a small product may run on other instructions.
        assert error(got, want) <= 1.05 * error(other, want) + 2**-12


@hopper_only
@pytest.mark.parametrize(("k", "tokens"), [(128, 20), (384, 70), (5120, 512)])
def test_blocks_or_warpgroups_that_share_a_tile_always_give_the_same_bits(k, tokens):
    """Also where one of them has no columns."""
    w = four_bit(weight_of("nvfp4", 1040, k))
    rows, scale = quantize_rows(make(tokens, k).bfloat16(), E4M3, interleaved=True)
    weight = (w.packed, w.scale.view(torch.uint8), w.tensor_scale)
    operands = (rows, scale, *weight, None, 1040, w.group, torch.float32)
    want = product_reference.run(*operands)
    for tile in (tile for tile in PRODUCT_TILES if tile.parts * tile.turns == 2):
        got = hopper.run_tile(*operands, tile)
        assert error(got, want) <= 2**-10
        assert all(torch.equal(hopper.run_tile(*operands, tile), got) for _ in range(100))


def written(weight, sources, side: torch.cuda.Stream | None) -> None:
    """Write another weight's tensors into those of `weight`, on a side stream if one is given."""
    here = torch.cuda.current_stream()
    if side is not None:
        side.wait_stream(here)
    with torch.cuda.stream(here if side is None else side):
        for to, source in zip(held(weight), sources, strict=True):
            to.copy_(source)
    if side is not None:
        here.wait_stream(side)


def held(weight) -> list[torch.Tensor]:
    w = four_bit(weight)
    return [w.packed, w.scale.view(torch.uint8), w.tensor_scale]


@hopper_only
@pytest.mark.parametrize(("m", "n", "k"), [(100, 3072, 3072), (512, 3072, 3072), (512, 1040, 5120)])
@pytest.mark.parametrize("on_the_side", [False, True])
def test_product_that_is_set_up_early_waits_for_activations_and_weights(m, n, k, on_the_side):
    """Its memory is what earlier calls used, and its weight was written to just before."""
    side = torch.cuda.Stream() if on_the_side else None
    inputs = [make(m, k, seed=i).bfloat16() for i in range(3)]
    sources = [[t.clone() for t in held(weight_of("nvfp4", n, k, seed=i))] for i in range(2)]
    weight, want = weight_of("nvfp4", n, k), {}
    rows = [quantize_activation(x, weight) for x in inputs]
    assert all(r.kind.interleaved for r in rows)
    for j, source in enumerate(sources):
        written(weight, source, None)
        for i, r in enumerate(rows):
            torch.cuda.synchronize()
            want[i, j] = linear(r, weight, backend="w4a8")
            torch.cuda.synchronize()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for step in range(300):
        i, j = step % 3, step // 5 % 2
        if step % 5 == 0:
            written(weight, sources[j], side)
            if step % 2:
                # Nothing between that and the product.
                wrong += (linear(rows[i], weight, backend="w4a8") != want[i, j]).sum()
        # Nothing between two products but the quantizer.
        got = [linear(inputs[(i + next_) % 3], weight, backend="w4a8") for next_ in range(3)]
        for next_, out in enumerate(got):
            wrong += (out != want[(i + next_) % 3, j]).sum()
        del got, out
    assert wrong.item() == 0


@hopper_only
def test_scale_of_nan_shows_in_its_output_and_no_other():
    packed, scale = raw(256, 512, 16)
    scale[:] = 0x38
    eye, one = interleave(torch.eye(512, device="cuda")).to(E4M3), torch.ones(1, device="cuda")
    scale[5] = 0x7F
    got = hopper.run(eye, one, packed, scale, None, None, 256, 16, torch.float32)
    # Times one or zero, NaN is NaN.
    assert torch.isnan(got).sum() == 512 and torch.isnan(got[:, 32]).all()


def test_strides_of_the_input_do_not_matter():
    weight = weight_of("nvfp4")
    for backend in ("w4a16", "w4a8"):
        for tokens in (60, 600):
            x = make(tokens, K, seed=2).bfloat16()
            wide = torch.full((tokens, 2 * K), torch.nan, device="cuda", dtype=x.dtype)
            wide[:, ::2] = x
            tall = torch.full((3 * tokens, K + 8), torch.nan, device="cuda", dtype=x.dtype)
            tall[::3, 3 : K + 3] = x
            want = linear(x, weight, backend=backend)
            for view in (wide[:, ::2], tall[::3, 3 : K + 3], x.t().contiguous().t()):
                assert torch.equal(linear(view, weight, backend=backend), want)


@pytest.mark.parametrize("backend", ["w4a16", "w4a8"])
@pytest.mark.parametrize("tokens", [40, 700])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_token_and_no_other(backend, tokens, bad):
    x, weight = make(tokens, K, seed=2).bfloat16(), weight_of("nvfp4")
    clean = linear(x, weight, backend=backend)
    x[7, 300] = bad
    got = linear(x, weight, backend=backend)
    assert not torch.isfinite(got[7]).any()
    got[7] = clean[7]
    assert torch.equal(got, clean)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="auto takes them where they were measured, on Hopper",
)
def test_auto_goes_by_the_number_of_tokens_and_the_weights_wish():
    weight = weight_of("nvfp4")
    for tokens, name in ((FEW_ROWS, "w4a16"), (FEW_ROWS + 1, "w4a8")):
        x = make(tokens, K).bfloat16()
        assert torch.equal(F.linear(x, weight), linear(x, weight, backend=name))
    wish = with_arithmetic(weight, "w4a16")
    assert torch.equal(F.linear(x, wish), linear(x, weight, backend="w4a16"))
    with pytest.raises(registry.NoBackendError, match="needs compute capability"):
        F.linear(x, with_arithmetic(weight, "native"))


def test_shared_and_fused_activations_are_those_of_each_alone():
    x, weights = make(500, K).bfloat16(), [weight_of("nvfp4", seed=s) for s in range(3)]
    alone = [linear(x, w) for w in weights]
    share(x, 3)
    for w, want in zip(weights, alone, strict=True):
        assert torch.equal(linear(x, w), want)
        release(x)
    got = linear(x, weights[0], input_act="gelu_tanh")
    assert error(got, exact(F.gelu(x.double(), approximate="tanh"), weights[0])) <= 0.04


class Layers:
    """A chain of layers of several shapes, as a model has them."""

    def __init__(self, seed: int = 0):
        shapes = [(3072, 3072), (12288, 3072), (3072, 12288)] * 3
        self.weights = [weight_of("nvfp4", *s, seed=seed + i) for i, s in enumerate(shapes)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = linear(x, weight, backend="w4a8")
            x /= x.abs().amax()
        return x


# Decoded in registers, and by a decoded weight.
@pytest.mark.parametrize("tokens", [512, 1600])
def test_scratch_is_bounded_and_goes_with_the_model(tokens):
    gc.collect()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    layers, x = Layers(), make(tokens, 3072).bfloat16()
    with torch.inference_mode():
        for _ in range(3):
            layers(x)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layers(x)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
    largest = 12288 * 3072
    # One buffer, and activations: [12288] at most, in 16 bits twice and 8 once.
    assert peak <= largest + 5 * tokens * 12288 + (1 << 20)
    del layers, x
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= start + (1 << 20)


@pytest.mark.parametrize("backend", ["w4a16", "w4a8"])
@pytest.mark.parametrize("tokens", [16, 512, 1600])
def test_products_can_be_captured_in_a_graph(backend, tokens):
    x, weight = make(tokens, K, seed=2).bfloat16(), weight_of("nvfp4")
    want = linear(x, weight, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = linear(x, weight, backend=backend)
    got.fill_(torch.nan)
    graph.replay()
    assert torch.equal(got, want)
    x.copy_(make(tokens, K, seed=5))
    graph.replay()
    assert torch.equal(got, linear(x, weight, backend=backend))


def test_compiled_products_are_one_graph():
    x, weight = make(512, K, seed=2).bfloat16(), weight_of("nvfp4")
    w = four_bit(weight)

    def sixteen(x):
        return fp4_mm(x, w.packed, w.scale, w.tensor_scale, w.shape, 16) * 2

    def eight(x):
        return linear(x, weight, backend="w4a8") * 2

    for run in (sixteen, eight):
        assert torch.equal(torch.compile(run, fullgraph=True)(x), run(x))
