"""`scaled_mm` against integers and float64, and what it refuses."""

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.scaled_mm import OP, scaled_mm, tiles

FP8 = torch.float8_e4m3fn
H200 = (9, 0)
PROCESSORS = 132


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (63, 17, 1008), (5, 33, 4096)])
def test_int8_sums_are_exact(m, n, k):
    """Up to 2^24, float32 holds every integer."""
    a, b = integers(m, k), integers(n, k, seed=1)
    want = a.to(torch.int64) @ b.to(torch.int64).t()
    got = scaled_mm(a, b, ones(1), ones(1), out_dtype=torch.float32)
    kept = want.abs() <= 1 << 24
    assert torch.equal(got[kept].to(torch.int64), want[kept])


def test_scales_then_bias_in_that_order():
    a, b = integers(7, 64), integers(9, 64, seed=1)
    scale_a, scale_b = floats(7, 1).abs() * 1e-3, floats(9, 1, seed=1).abs() * 1e-3
    bias = floats(9, seed=2)
    total = (a.to(torch.int64) @ b.to(torch.int64).t()).float()
    want = total * scale_a * scale_b.t() + bias
    got = scaled_mm(a, b, scale_a, scale_b, bias, out_dtype=torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_is_rounded_once(out_dtype):
    a, b = integers(7, 64), integers(9, 64, seed=1)
    scale = torch.tensor(1e-4)
    full = scaled_mm(a, b, scale, scale, floats(9), out_dtype=torch.float32)
    assert torch.equal(
        scaled_mm(a, b, scale, scale, floats(9), out_dtype=out_dtype), full.to(out_dtype)
    )


def test_zero_point_shifts_the_activation():
    """(a - zero point) · bᵀ, before the scales."""
    a, b = integers(7, 64), integers(9, 64, seed=1)
    zero_point = torch.arange(-3, 4, dtype=torch.int32) * 9
    want = (a.to(torch.int64) - zero_point[:, None]) @ b.to(torch.int64).t()
    got = scaled_mm(
        a,
        b,
        ones(7, 1),
        ones(9, 1),
        zero_point=zero_point,
        column_sum=b.sum(1, dtype=torch.int32),
        out_dtype=torch.float32,
    )
    assert torch.equal(got.to(torch.int64), want)


@pytest.mark.parametrize("dtype_b", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_product_is_that_of_the_values(dtype_b):
    a, b = floats(7, 64).to(FP8), floats(9, 64, seed=1).to(dtype_b)
    want = (a.double() @ b.double().t() * 0.5).float()
    got = scaled_mm(a, b, torch.tensor(0.5), ones(9), out_dtype=torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("m", [0, 1, 17, 63, 1000])
def test_any_number_of_tokens(m):
    got = scaled_mm(integers(m, 32), integers(5, 32), ones(m, 1), ones(5, 1))
    assert (got.shape, got.dtype) == ((m, 5), torch.bfloat16)


def test_rows_may_lie_apart():
    wide = integers(14, 96)
    a = wide[::2, :64]
    got = scaled_mm(a, a, ones(1), ones(1), out_dtype=torch.float32)
    assert torch.equal(
        got, scaled_mm(a.clone(), a.clone(), ones(1), ones(1), out_dtype=torch.float32)
    )


A, B = integers(6, 32), integers(8, 32)
INT32 = torch.zeros(6, dtype=torch.int32)
# K of two blocks, N of two: the scales' shapes are [6, 2] and [2, 2].
WIDE_A, WIDE_B = integers(6, 160), integers(130, 160)
BLOCKS = {"a": WIDE_A, "b": WIDE_B, "scale_a": ones(6, 2), "scale_b": ones(2, 2)}
POINT = {"zero_point": INT32, "column_sum": torch.zeros(130, dtype=torch.int32)}
REFUSED = [
    (TypeError, {"a": A.float()}, r"a is torch.float32; torch.int8 or .* is wanted: quantize"),
    (TypeError, {"b": B.short()}, r"b is torch.int16"),
    (TypeError, {"b": B.float().to(FP8)}, r"a is torch.int8, b is .*; both INT8 or both FP8"),
    (ValueError, {"a": A[0]}, r"a is \[32\]; two dimensions"),
    (ValueError, {"b": integers(32, 8)}, r"b is \[32, 8\]; a \[M, K\] and b \[N, K\].*transposed"),
    (ValueError, {"a": A[:, :24], "b": B[:, :24]}, r"K=24 is not a positive multiple of 16; pad"),
    (ValueError, {"a": A[:, :0], "b": B[:, :0]}, r"K=0 is not a positive multiple"),
    (
        ValueError,
        {"b": integers(32, 8).t()},
        r"b has strides \(1, 8\); K-contiguous.*contiguous\(\)",
    ),
    (ValueError, {"a": integers(6, 40)[:, :32]}, r"a has strides \(40, 1\)"),
    (ValueError, {"a": A[:1].expand(6, 32)}, r"a has strides \(0, 1\)"),
    (TypeError, {"scale_a": ones(6, 1).double()}, r"scale_a is torch.float64; torch.float32"),
    (ValueError, {"scale_a": ones(8, 1)}, r"scale_a is \[8, 1\]; one scale, or \[6, 1\].*row of a"),
    (ValueError, {"scale_b": ones(8, 2)}, r"scale_b is \[8, 2\]; one scale, or \[8, 1\]"),
    (ValueError, {"scale_b": ones(16)[::2]}, r"scale_b is not contiguous"),
    (ValueError, {"bias": ones(6)}, r"bias is \[6\]; \[8\] is wanted"),
    (TypeError, {"bias": ones(8).double()}, r"bias is torch.float64; cast it to"),
    (ValueError, {"zero_point": INT32}, r"zero_point and column_sum are given together"),
    (ValueError, {"zero_point": INT32, "column_sum": INT32}, r"column_sum is torch.int32 \[6\]"),
    (
        ValueError,
        {**BLOCKS, "scale_b": ones(130, 1)},
        r"scale_a is \[6, 2\]; one scale, or \[6, 1\].*or one per block of both: scale_a \[6, 2\] "
        r"for 1x128 and scale_b \[2, 2\] for 128x128",
    ),
    (
        ValueError,
        {**BLOCKS, "scale_a": ones(6, 1)},
        r"scale_b is \[2, 2\]; one scale, or \[130, 1\]",
    ),
    (ValueError, {**BLOCKS, "scale_a": ones(6, 3)}, r"scale_a is \[6, 3\]"),
    (ValueError, {**BLOCKS, "scale_b": ones(2, 2).t()}, r"scale_b is not contiguous"),
    (TypeError, {**BLOCKS, "scale_b": ones(2, 2).half()}, r"scale_b is torch.float16"),
    (ValueError, {**BLOCKS, **POINT}, r"a zero point with one scale per block; give one scale per"),
    (ValueError, {"bias": ones(16)[::2]}, r"bias is not contiguous"),
    (ValueError, {"activation": "silu"}, r"activation is 'silu'; None and gelu_tanh are known"),
    (ValueError, {"residual": ones(8, 6)}, r"residual is \[8, 6\]; \[6, 8\] is wanted, the shape"),
    (ValueError, {"residual": ones(8, 6).t()}, r"residual has strides \(1, 6\); contiguous rows"),
    (TypeError, {"residual": A[:, :8]}, r"residual is torch.int8; cast it to torch.bfloat16"),
    (
        ValueError,
        {"gate": ones(4, 8)},
        r"gate is \[4, 8\]; \[R, 8\] is wanted, whose R divides M=6",
    ),
    (ValueError, {"gate": ones(8)}, r"gate is \[8\]; \[R, 8\] is wanted"),
    (ValueError, {"gate": ones(0, 8)}, r"gate is \[0, 8\]; \[R, 8\] is wanted"),
    (ValueError, {"gate": ones(2, 6)}, r"gate is \[2, 6\]; \[2, 8\] is wanted, one per output"),
    (ValueError, {"gate": ones(8, 2).t()}, r"gate has strides \(1, 2\); contiguous rows"),
    (ValueError, {"gate": ones(1, 8).to("meta")}, r"gate is on meta, a on cpu; move both"),
    (TypeError, {"out_dtype": torch.int32}, r"out_dtype is torch.int32; torch.bfloat16"),
    (ValueError, {"scale_a": ones(6, 1).to("meta")}, r"scale_a is on meta, a on cpu; move both"),
    (ValueError, {"backend": "cutlass"}, r"unknown backend 'cutlass'"),
    (registry.NoBackendError, {"backend": "triton"}, r"triton: needs a device of \['cuda'\]"),
]


@pytest.mark.parametrize(("kind", "changed", "message"), REFUSED, ids=lambda v: None)
def test_what_does_not_fit_is_named(kind, changed, message):
    good = {"a": A, "b": B, "scale_a": ones(6, 1), "scale_b": ones(8, 1)}
    with pytest.raises(kind, match=message):
        scaled_mm(**{**good, **changed})


def test_zero_point_of_fp8_is_refused():
    a, b = floats(6, 32).to(FP8), floats(8, 32).to(FP8)
    total = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(TypeError, match="a zero point needs INT8 operands"):
        scaled_mm(a, b, ones(1), ones(1), zero_point=INT32, column_sum=total)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"activation": "gelu_tanh", "gate": floats(2, 8), "residual": floats(6, 8)},
        {**BLOCKS, "bias": floats(130), "residual": floats(6, 130)},
    ],
    ids=["plain", "epilogue", "blocks"],
)
def test_operation_is_one_step_of_a_graph(given):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    @torch.compile(fullgraph=True, backend=count)
    def run(given):
        return scaled_mm(**given) + 1

    given = {"a": A, "b": B, "scale_a": ones(6, 1), "scale_b": ones(8, 1), **given}
    assert torch.equal(run(given), scaled_mm(**given) + 1)
    assert len(graphs) == 1


def test_number_of_tokens_does_not_compile_again():
    """With a gate for each half of them, and scales of blocks."""
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def run(a, scale_a, residual):
        rest = {"gate": gate, "residual": residual, "activation": "gelu_tanh"}
        return scaled_mm(a, WIDE_B, scale_a, ones(2, 2), **rest)

    gate = floats(2, 130)
    for m in (6, 10, 64):
        a, scale, residual = integers(m, 160), floats(m, 2).abs(), floats(m, 130)
        got = run(a, scale, residual)
        rest = {"gate": gate, "residual": residual, "activation": "gelu_tanh"}
        assert torch.equal(got, scaled_mm(a, WIDE_B, scale, ones(2, 2), **rest))
    assert len(graphs) == 1


def test_operands_on_the_meta_device_give_shape_and_dtype():
    a, b, scale = (x.to("meta") for x in (A, B, ones(1)))
    rest = {"gate": ones(3, 8).to("meta"), "residual": ones(6, 8).to("meta")}
    got = scaled_mm(a, b, scale, scale, **rest, out_dtype=torch.float16)
    assert (got.shape, got.dtype, got.device.type) == ((6, 8), torch.float16, "meta")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("integer", [True, False])
def test_every_product_has_a_tile(capability, integer):
    for m in (1, 16, 17, 33, 128, 512, 513, 75_600):
        tile = tiles.choose(capability, PROCESSORS, m, 5120, 5120, integer)
        assert not tile.tma or (capability in ((9, 0), (10, 0)) and m > 32)
        assert tile.tma or capability != H200 or m <= 32
        assert tile.block_m <= max(2 * m, 32)


def test_tile_follows_the_number_of_waves():
    """512 tokens fill a GPU only with small tiles, 32,760 tokens with any."""
    small = tiles.choose(H200, PROCESSORS, 512, 3072, 3072, True)
    large = tiles.choose(H200, PROCESSORS, 32_760, 5120, 5120, True)
    assert small.block_m * small.block_n < large.block_m * large.block_n


def test_reference_is_the_last_resort():
    assert registry.backends(OP)[-1].name == "reference"
