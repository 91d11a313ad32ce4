"""The scaled product on the GPU: every backend and scheme, all that may follow, against float64."""

import pytest
import torch
import torch.nn.functional as F

from lowbit.ops import registry
from lowbit.ops.quantize_rows import quantize_rows
from lowbit.ops.scaled_mm import OP, scaled_mm
from lowbit.ops.scaled_mm.check import BLOCK

DTYPES = {
    "int8": (torch.int8, torch.int8),
    "fp8": (torch.float8_e4m3fn, torch.float8_e4m3fn),
    "fp8_mixed": (torch.float8_e4m3fn, torch.float8_e5m2),
    "fp8_e5m2": (torch.float8_e5m2, torch.float8_e5m2),
}
# What E5M2 changes is not the scales: to compile less, it is tried with those of rows.
FOUND = [
    pytest.param(backend, name, id=f"{backend.name}-{name}")
    for backend in registry.backends(OP)
    if backend.name != "reference"
    for name in sorted(backend.needs.schemes)
    if name.rsplit("_", 1)[0] in ("int8", "fp8") or name.endswith("_row")
]
# Of ours, the variants of the kernel that differ most; of the libraries, all.
WE = ("triton", "hopper")
VARIANTS = ("int8_row", "fp8_row", "int8_block", "fp8_block")
TRIED = [c for c in FOUND if not c.id.startswith(WE) or c.values[1] in VARIANTS]
OURS = [c for c in TRIED if c.id.startswith(WE)]
# Relative L2 error of the sums: Hopper adds FP8 products with some 14 bits, over all of K or, with
# scales of blocks, over 128 columns; INT8 is exact, and only float32's roundings follow.
OF_SUMS = {"int8": 2**-20, "fp8": 2**-8, "block": 2**-11}


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def operands(name: str, m: int, n: int, k: int) -> list[torch.Tensor]:
    """Operands and scales of a scheme."""
    kind, scales = name.rsplit("_", 1)
    columns, rows = -(-k // BLOCK), -(-n // BLOCK)
    shapes = {"tensor": ((), ()), "row": ((m, 1), (n, 1)), "block": ((m, columns), (rows, columns))}
    size = 30 if kind == "int8" else 3
    a, b = (
        (make(rows, k, seed=rows) * size).to(d)
        for rows, d in zip((m, n), DTYPES[kind], strict=True)
    )
    return [a, b, *((make(*shape, seed=5).abs() + 0.1) * 1e-2 for shape in shapes[scales])]


def values(x: torch.Tensor, scale: torch.Tensor, rows: int) -> torch.Tensor:
    """What x [M, K] and its scales stand for, in float64; rows: of a block."""
    if scale.dim() == 2 and scale.shape[1] > 1:
        scale = scale.repeat_interleave(rows, 0)[: x.shape[0]]
        scale = scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    return x.double() * scale.double()


def wanted(a, b, scale_a, scale_b, bias=None, activation=None, gate=None, residual=None):
    """The result in float64."""
    value = values(a, scale_a, 1) @ values(b, scale_b, BLOCK).t()
    value = value if bias is None else value + bias.double()
    value = F.gelu(value, approximate="tanh") if activation else value
    if gate is not None:
        value = value * gate.double().repeat_interleave(len(value) // len(gate), 0)
    return value if residual is None else value + residual.double()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def bound(name: str, out_dtype: torch.dtype) -> float:
    kind = "int8" if name.startswith("int8") else name.rsplit("_", 1)[1]
    return torch.finfo(out_dtype).eps + OF_SUMS.get(kind, OF_SUMS["fp8"])


def needed(backend: registry.Backend, name: str, n: int, k: int) -> None:
    """Skip where the backend cannot run; never because it was wrong when it tried."""
    reason = registry.unmet(backend.needs, registry.Call(name, torch.device("cuda", 0), n, k))
    if reason is not None:
        assert " errs by " not in reason, reason
        pytest.skip(f"{backend.name}: {reason}")


def run(backend: registry.Backend, given: list, **rest) -> torch.Tensor:
    """The result through the public name, of memory poisoned with NaN."""
    shape = (given[0].shape[0], given[1].shape[0])
    torch.full(shape, torch.nan, device="cuda", dtype=rest.get("out_dtype", torch.bfloat16))
    return scaled_mm(*given, **rest, backend=backend.name)


@pytest.mark.parametrize(("backend", "name"), FOUND)
@pytest.mark.parametrize(
    ("m", "n", "k", "out_dtype"),
    [
        (0, 144, 512, torch.bfloat16),
        (1, 131, 1040, torch.bfloat16),
        (1, 144, 512, torch.bfloat16),
        (17, 144, 512, torch.float16),
        (63, 131, 1040, torch.float32),
        (1000, 131, 1040, torch.bfloat16),
        (1000, 144, 512, torch.float32),
        (1000, 288, 1040, torch.bfloat16),
        (2049, 3072, 512, torch.float16),
        (1, 32, 16, torch.float32),
    ],
)
def test_product_is_near_float64(backend, name, m, n, k, out_dtype):
    needed(backend, name, n, k)
    given, bias = operands(name, m, n, k), make(n, seed=3).to(out_dtype)
    got = run(backend, [*given, bias], out_dtype=out_dtype)
    assert (got.shape, got.dtype) == ((m, n), out_dtype)
    if m:
        assert error(got, wanted(*given, bias)) <= bound(name, out_dtype)


@pytest.mark.parametrize(("backend", "name"), TRIED)
@pytest.mark.parametrize("m", [18, 1000])
@pytest.mark.parametrize(
    ("activation", "gates", "kept"),
    [
        ("gelu_tanh", "none", None),
        (None, "one", torch.bfloat16),
        (None, "none", torch.float32),
        ("gelu_tanh", "two", torch.float32),
        ("gelu_tanh", "all", torch.float16),
    ],
)
def test_whatever_follows_is_near_float64(backend, name, m, activation, gates, kept):
    """Gate and residual lie apart in memory that holds NaN, and are not written to."""
    n, k = 288, 512
    needed(backend, name, n, k)
    given, bias = operands(name, m, n, k), make(n, seed=3)
    rows = {"none": 0, "one": 1, "two": 2, "all": m}[gates]
    gate, residual = apart(rows, n, torch.float32), apart(m, n, kept) if kept else None
    rest = {"activation": activation, "gate": gate if rows else None, "residual": residual}
    before = [None if x is None else x.clone() for x in (rest["gate"], residual)]
    got = run(backend, [*given, bias], **rest, out_dtype=torch.float32)
    # The sums may all but cancel the residual: their own error counts, of their own size.
    plain = wanted(*given, bias)
    size = plain.norm() * (gate.abs().max() if rows else 1)
    limit = bound(name, torch.float32) * 2 * size
    assert (got.double() - wanted(*given, bias, **rest)).norm() <= limit
    for x, old in zip((rest["gate"], residual), before, strict=True):
        assert x is None or torch.equal(x, old)


def apart(rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    whole = torch.full((rows, 2 * n + 8), torch.nan, device="cuda", dtype=dtype)
    part = whole[:, 3 : n + 3]
    return part.copy_(make(rows, n, seed=7))


@pytest.mark.parametrize(("backend", "name"), OURS)
@pytest.mark.parametrize(("m", "n", "k"), [(4224, 3072, 3072), (513, 5120, 1536), (40, 3075, 5120)])
def test_sizes_of_models_with_everything(backend, name, m, n, k):
    needed(backend, name, n, k)
    given, bias = operands(name, m, n, k), make(n, seed=3).bfloat16()
    rest = {
        "activation": "gelu_tanh",
        "gate": make(1, n, seed=4),
        "residual": make(m, n, seed=5).bfloat16(),
    }
    got = run(backend, [*given, bias], **rest)
    assert error(got, wanted(*given, bias, **rest)) <= bound(name, torch.bfloat16)


@pytest.mark.parametrize(
    ("backend", "scales", "n"),
    [("triton", "row", 259), ("triton", "block", 259), ("hopper", "row", 288)],
)
@pytest.mark.parametrize("m", [17, 1000])
def test_int8_is_exact_with_integers_throughout(backend, scales, n, m):
    """Scales and gates are powers of two: float32 rounds nothing, whatever the tile."""
    k = 1040
    found = next(b for b in registry.backends(OP) if b.name == backend)
    needed(found, f"int8_{scales}", n, k)
    generator = torch.Generator("cuda").manual_seed(0)

    def integers(*shape: int, most: int) -> torch.Tensor:
        return torch.randint(-most, most, shape, generator=generator, device="cuda")

    a, b = (integers(rows, k, most=8).to(torch.int8) for rows in (m, n))
    shapes = {"row": ((m, 1), (n, 1)), "block": ((m, 9), (3, 9))}[scales]
    scale_a, scale_b = (2.0 ** integers(*shape, most=2) for shape in shapes)
    rest = {
        "gate": 2.0 ** integers(m, n, most=2),
        "residual": integers(m, n, most=99).half(),
    }
    bias = integers(n, most=99).float()
    given = (a, b, scale_a, scale_b, bias)
    got = scaled_mm(*given, **rest, out_dtype=torch.float32, backend=backend)
    assert torch.equal(got.double(), wanted(a, b, scale_a, scale_b, bias, **rest))


def test_gelu_is_that_of_float64_and_hides_nothing():
    x = torch.cat((torch.linspace(-30, 30, 4000), torch.tensor([1e4, 1e20, -1e20, 0.0])))
    x = torch.cat((x, torch.tensor([torch.nan, torch.inf, -torch.inf]))).cuda().reshape(-1, 1)
    a = torch.zeros(len(x), 16, dtype=torch.int8, device="cuda")
    a[:, 0] = 1
    b, one = torch.ones(1, 16, dtype=torch.int8, device="cuda"), torch.ones(1, device="cuda")
    got = scaled_mm(a, b, x, one, activation="gelu_tanh", out_dtype=torch.float32, backend="triton")
    want = F.gelu(x.double(), approximate="tanh").float()
    # 1 + tanh in float64 has no digits left below.
    normal = ~(x < -5)
    # exp2 of up to 24, itself rounded to 2^-24 of that, three times over.
    torch.testing.assert_close(got[normal], want[normal], rtol=5e-6, atol=0, equal_nan=True)
    tail = torch.isfinite(x) & (x < -5)
    assert (got[tail].abs() < 3e-7).all() and (got[tail] <= 0).all()
    assert torch.isnan(got[-1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["int8_block", "fp8_block"])
def test_what_is_not_finite_shows_in_its_row_and_no_other(bad, name):
    given = operands(name, 700, 272, 640)
    clean = scaled_mm(*given, activation="gelu_tanh", backend="triton")
    given[2][7, 3] = bad
    got = scaled_mm(*given, activation="gelu_tanh", backend="triton")
    assert not torch.isfinite(got[7]).all()
    got[7] = clean[7]
    assert torch.equal(got, clean)


def test_scales_of_blocks_may_lie_in_columns():
    given = operands("fp8_block", 700, 272, 640)
    want = scaled_mm(*given, backend="triton")
    given[2] = given[2].t().contiguous().t()
    assert torch.equal(scaled_mm(*given, backend="triton"), want)


def test_result_of_more_than_two_thousand_million_values():
    """Indices pass 2^31, of the result, of the residual and of the gate."""
    m, n, k = 140_000, 16_384, 16
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    a, b, scale_a, scale_b = operands("int8_row", m, n, k)
    wide = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")
    gate, residual = wide + 0.5, wide
    residual[-1] = torch.arange(n, device="cuda")
    got = scaled_mm(a, b, scale_a, scale_b, gate=gate, residual=residual, backend="triton")
    rest = {"gate": gate[-9:], "residual": residual[-9:]}
    want = wanted(a[-9:], b, scale_a[-9:], scale_b, **rest)
    assert error(got[-9:], want) <= bound("int8_row", torch.bfloat16)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 3072, 3072), (16, 512, 5120), (512, 3072, 3072)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_kernels_that_start_early_never_read_too_soon(m, n, k, dtype):
    """A chain of products, in memory that is given back and taken again, as if one at a time."""
    w = (make(n, k, seed=1) * 40).to(dtype)
    scale = make(n, 1, seed=2).abs() * 1e-3

    def chain(wait) -> list[torch.Tensor]:
        kept, x = [], make(m, k, seed=3).bfloat16()
        for step in range(100):
            stored, row_scale = quantize_rows(x, dtype, backend="triton")
            wait()
            rest = {"residual": x[:, :n], "backend": "triton"}
            out = scaled_mm(stored, w, row_scale, scale, **rest)
            wait()
            again = scaled_mm(stored, w, row_scale, scale, **rest, activation="gelu_tanh")
            wait()
            kept.append(out.float().sum(1) + again.float().sum(1))
            x = x.roll(step + 1, 1)
            wait()
        return kept

    early = chain(lambda: None)
    torch.cuda.synchronize()
    one_by_one = chain(torch.cuda.synchronize)
    assert all(torch.equal(a, b) for a, b in zip(early, one_by_one, strict=True))


def test_chain_in_a_graph_gives_what_it_gives_alone():
    """CUDA graphs record that a kernel may start early."""
    w = (make(3072, 3072, seed=1) * 40).to(torch.int8)
    scale, x = make(3072, 1, seed=2).abs() * 1e-3, make(64, 3072).bfloat16()

    def run() -> torch.Tensor:
        stored, row_scale = quantize_rows(x, torch.int8, backend="triton")
        return scaled_mm(stored, w, row_scale, scale, backend="triton")

    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    got.fill_(torch.nan)
    for _ in range(20):
        graph.replay()
    assert torch.equal(got, want)


def test_compiled_with_everything_is_one_graph():
    given = operands("int8_row", 1000, 272, 512)
    residual, gate = make(1000, 272).bfloat16(), make(2, 272)

    def run(a):
        rest = {"activation": "gelu_tanh", "gate": gate, "residual": residual + 1}
        return scaled_mm(a, *given[1:], **rest) * 2

    got = torch.compile(run, fullgraph=True)(given[0])
    assert torch.equal(got, run(given[0]))
