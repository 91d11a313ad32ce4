"""The libraries' products, on the CPU where they run there too, against the reference."""

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.launch import TRITON_MIN
from lowbit.ops.scaled_mm import OP, self_test
from lowbit.ops.scaled_mm.check import BLOCK, scheme
from lowbit.ops.scaled_mm.reference import run as reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LIBRARIES = ("torch", "kitchen")
FOUND = [
    pytest.param(backend, name, id=f"{backend.name}-{name}")
    for backend in registry.backends(OP)
    if backend.name in LIBRARIES
    for name in sorted(backend.needs.schemes)
]
ON_CPU = [case for case in FOUND if "block" not in case.id]
SHAPES = [(1, 16, 16), (17, 48, 160), (63, 32, 512)]


def floats(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(name: str, m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Operands and scales of a scheme."""
    kind, scales = name.split("_")
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    a, b = ((floats(rows, k, seed=rows) * 30).to(dtype) for rows in (m, n))
    columns, rows = -(-k // BLOCK), -(-n // BLOCK)
    shapes = {"tensor": ((), ()), "row": ((m, 1), (n, 1)), "block": ((m, columns), (rows, columns))}
    given = (a, b, *(floats(*s, seed=5).abs() * 1e-2 for s in shapes[scales]))
    assert scheme(*given) == name or m == 1
    return given


@pytest.mark.parametrize(("backend", "name"), ON_CPU)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
def test_product_is_that_of_the_reference(backend, name, shape, out_dtype, bias):
    given = operands(name, *shape)
    bias = None if bias is None else floats(shape[1]).to(bias)
    rest = (bias, None, None, None, None, None, out_dtype)
    got, want = backend.run(*given, *rest), reference(*given, *rest)
    assert (got.dtype, got.shape) == (out_dtype, shape[:2])
    # One rounding of a value that sums in another order have moved a little.
    limit = torch.finfo(out_dtype).eps + 2**-20
    assert (got.double() - want.double()).norm() <= limit * want.double().norm()


@pytest.mark.parametrize(("backend", "name"), ON_CPU)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_whatever_follows_the_sums_is_that_of_the_reference(backend, name, out_dtype):
    m, n, k = 18, 32, 160
    given = operands(name, m, n, k)
    point = (torch.arange(m).int(), given[1].int().sum(1).int()) if "int8" in name else (None, None)
    rest = (floats(n), *point, "gelu_tanh", floats(3, n), floats(m, n).half(), out_dtype)
    got, want = backend.run(*given, *rest), reference(*given, *rest)
    limit = torch.finfo(out_dtype).eps + 2**-20
    assert (got.double() - want.double()).norm() <= limit * want.double().norm()


@pytest.mark.parametrize(("backend", "name"), ON_CPU)
def test_operands_may_start_anywhere_and_lie_apart(backend, name):
    a, b, scale_a, scale_b = operands(name, 18, 32, 160)
    storage = torch.zeros(1 + 32 * 176, dtype=torch.uint8).view(b.dtype)
    apart = storage[1:].reshape(32, 176)[:, :160]
    apart.copy_(b)
    rest = (None, None, None, None, None, None, torch.float32)
    want = backend.run(a, b, scale_a, scale_b, *rest)
    assert torch.equal(backend.run(a, apart, scale_a, scale_b, *rest), want)


def test_scales_of_blocks_have_the_shapes_that_torch_takes():
    """On the meta device, whose checks are the same everywhere; the product itself needs SM90."""
    (backend,) = (case.values[0] for case in FOUND if case.id == "torch-fp8_block")
    given = (x.to("meta") for x in operands("fp8_block", 19, 144, 512))
    got = backend.run(*given, *[None] * 6, torch.bfloat16)
    assert (got.shape, got.dtype) == ((19, 144), torch.bfloat16)


@pytest.mark.parametrize(("backend", "name"), ON_CPU)
def test_self_test_passes_where_the_product_is_right(backend, name):
    assert backend.needs.self_test(CPU) is None


@pytest.mark.parametrize("operand", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda want: want * 0, "somebody's mm, row scales, errs by 1.00 here"),
        (lambda want: want * torch.nan, "errs by nan"),
        (lambda want: want.flip(0), "errs by 1"),
    ],
)
def test_self_test_names_a_wrong_result(operand, wrong, reason):
    test = self_test.self_test("somebody's mm", lambda *g: wrong(reference(*g)), operand, "row")
    assert reason in test(CPU)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, NotImplementedError])
def test_self_test_names_a_failure(kind):
    def fail(*given):
        raise kind("cublasLt >= 12.9 is wanted")

    test = self_test.self_test("torch._scaled_mm", fail, "fp8", "block")
    assert test(CPU) == "torch._scaled_mm, block scales, fails here: cublasLt >= 12.9 is wanted"


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that pretends a GPU of some capability, where every library works."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(registry, "capability", lambda device: (major, minor))
        monkeypatch.setattr(registry, "_has_package", lambda name: True)
        monkeypatch.setattr(registry, "_version", lambda name: TRITON_MIN)
        monkeypatch.setattr(registry, "_self_test", lambda test, device: None)

    registry.select.cache_clear()
    yield pretend
    registry.select.cache_clear()


def chosen(scheme: str, name: str = "auto", n: int = 64, k: int = 512) -> str:
    return registry.select(OP, registry.Call(scheme, CUDA, n, k), name).name


def test_auto_takes_our_kernel_on_a_gpu(gpu):
    gpu(9, 0)
    assert {chosen(name) for name in ("int8_row", "fp8_tensor", "fp8_row", "fp8_block")} == {
        "triton"
    }


def test_without_triton_a_library_is_taken(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(registry, "_has_package", lambda name: "triton" not in name)
    names = {name: chosen(name) for name in ("int8_row", "fp8_tensor", "fp8_row", "fp8_block")}
    assert names == {
        "int8_row": "kitchen",
        "fp8_tensor": "kitchen",
        "fp8_row": "torch",
        "fp8_block": "torch",
    }
    assert chosen("int8_block") == "reference"


@pytest.mark.parametrize(
    ("capability", "scheme", "name", "n", "k", "reason"),
    [
        ((9, 0), "int8_block", "torch", 64, 512, "torch: does not know int8_block"),
        ((9, 0), "fp8_row", "kitchen", 64, 512, "kitchen: does not know fp8_row"),
        ((9, 0), "fp8_e5m2_row", "torch", 64, 512, "does not know fp8_e5m2_row"),
        ((8, 6), "fp8_row", "torch", 64, 512, r"needs compute capability \(8, 9\)"),
        ((8, 9), "fp8_block", "torch", 64, 512, r"needs compute capability \(9, 0\)"),
        ((9, 0), "fp8_block", "torch", 64, 640, "K=640 is not a multiple of 512"),
        ((9, 0), "fp8_row", "torch", 40, 512, "N=40 is not a multiple of 16"),
        ((9, 0), "int8_row", "torch", 36, 512, "N=36 is not a multiple of 8"),
    ],
)
def test_what_a_library_cannot_do_is_known_before_it_runs(
    gpu, capability, scheme, name, n, k, reason
):
    gpu(*capability)
    with pytest.raises(registry.NoBackendError, match=reason):
        chosen(scheme, name, n, k)


def test_each_reason_is_named_once(gpu):
    gpu(9, 0)
    with pytest.raises(registry.NoBackendError) as caught:
        chosen("int8_block", "torch")
    assert str(caught.value).count("does not know") == 1
