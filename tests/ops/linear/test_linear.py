"""Products with a quantized weight, against float64 with the dequantized weight."""

import functools

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops import registry
from lowbit.ops.linear import OP, linear
from lowbit.ops.linear.four_bit import GROUPS
from lowbit.quant import formats

CPU = torch.device("cpu")
# Square ones hide a transposed weight, others a transposed scale.
SHAPES = [(256, 256), (33, 256)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Backends that round the activation do it as these formats round a weight: per row, from its
# largest value, with the same rotation. Their `max_error` is then the error of the activation.
ROUNDS_INPUT_LIKE = {
    ("kitchen", "int8_row"): "int8",
    ("kitchen", "int8_row_convrot"): "int8_convrot",
    ("kitchen", "asym_w4a8_int8"): "int8_convrot",
    ("kitchen", "convrot_w4a4"): "convrot_w4a4",
    ("torch", "fp8_row"): "fp8_e4m3_rowwise",
}


@functools.cache
def weight_of(name: str, shape: tuple[int, int]) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(0)
    return formats.get(name).quantize(torch.randn(shape, generator=generator) * shape[1] ** -0.5)


@pytest.fixture(params=formats.names())
def fmt(request):
    return formats.get(request.param)


@pytest.fixture(params=SHAPES, ids=str)
def weight(request, fmt):
    return weight_of(fmt.name, request.param)


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backend_of(weight: QuantizedTensor, name: str = "auto") -> registry.Backend:
    call = registry.Call(weight.layout_cls.scheme, CPU, *weight.shape)
    return registry.select(OP, call, name)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def check(got, x, weight, bias=None, backend=None) -> None:
    """Assert that `got` is x · Wᵀ + bias within twice torch's own error, and the input's rounding.

    torch's own error is that of F.linear in the dtype of x with the dequantized weight.
    """
    plain = weight.to(torch.float32).dequantize()
    want = F.linear(x.double(), plain.double(), None if bias is None else bias.double())
    assert (got.dtype, got.shape) == (x.dtype, want.shape)
    ours = F.linear(x, plain.to(x.dtype), None if bias is None else bias.to(x.dtype))
    like = ROUNDS_INPUT_LIKE.get((backend or backend_of(weight).name, weight.layout_cls.scheme))
    rounding = formats.get(like).max_error if like else 0
    # Sums of float32 in other orders differ from each other as much as from float64.
    assert error(got, want) <= 2 * error(ours, want) + rounding + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_product_is_that_of_the_values(weight, dtype, mode):
    """In inference mode torch hands `linear` over whole, otherwise as a transpose and a product."""
    n, k = weight.shape
    x = make(7, k, dtype=dtype)
    bias = make(n, dtype=dtype, seed=2) if dtype != torch.bfloat16 or n == k else None
    # Without inference mode torch itself asks for equal dtypes.
    weight = weight.to(dtype)
    with mode():
        check(F.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_weight_and_bias_may_differ_from_that_of_the_input(fmt, dtype):
    weight = weight_of(fmt.name, (33, 256))
    x, bias = make(3, weight.shape[1], dtype=dtype), make(weight.shape[0], seed=2)
    for logical in {torch.float32, torch.bfloat16} - {dtype}:
        with torch.inference_mode():
            got = F.linear(x, weight.to(logical), bias)
        assert got.dtype == dtype
        # Values or results rounded to the weight's logical dtype, 8 bits of mantissa at worst.
        coarse = x if torch.finfo(dtype).eps > torch.finfo(logical).eps else x.to(logical)
        check(got.to(coarse.dtype), coarse, weight, bias)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 4, 3)])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_any_number_of_dimensions(fmt, lead, mode):
    weight = weight_of(fmt.name, (33, 256))
    x = make(*lead, 256)
    with mode():
        got = F.linear(x, weight, torch.ones(33))
        assert got.shape == (*lead, 33)
        if x.numel():
            check(got, x, weight, torch.ones(33))
        bare = linear(x, weight)
    assert (bare.shape, bare.dtype) == ((*lead, 33), torch.float32)


def strided(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return views with the values of x [M, K], with NaN between them."""
    m, k = x.shape
    wide = torch.full((m, 2 * k), torch.nan, dtype=x.dtype)
    wide[:, ::2] = x
    tall = torch.full((3 * m, k), torch.nan, dtype=x.dtype)
    tall[::3] = x
    return {"columns": wide[:, ::2], "rows": tall[::3], "transposed": x.t().contiguous().t()}


@pytest.mark.parametrize("view", ["columns", "rows", "transposed"])
def test_strides_of_the_input_do_not_matter(fmt, view):
    weight = weight_of(fmt.name, (33, 256))
    x = make(6, weight.shape[1])
    with torch.inference_mode():
        check(F.linear(strided(x)[view], weight), x, weight)
        swapped = x.reshape(2, 3, -1).transpose(0, 1)
        check(F.linear(swapped, weight), swapped, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_input_weight_and_bias_are_never_written_to(fmt, dtype, mode):
    weight = weight_of(fmt.name, (33, 256))
    x, bias = make(7, weight.shape[1], dtype=dtype), make(weight.shape[0], dtype=dtype)
    weight = weight.to(dtype)
    packed = formats.of(weight).pack(weight)
    kept = [x, bias, *(t.view(torch.uint8) if t.itemsize == 1 else t for t in packed.values())]
    before = [t.clone() for t in kept]
    with mode():
        F.linear(x, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_zero_input_gives_the_bias(weight):
    bias = make(weight.shape[0])
    with torch.inference_mode():
        got = F.linear(torch.zeros(3, weight.shape[1]), weight, bias)
    assert torch.equal(got, bias.expand(3, -1))


def test_each_token_is_rounded_by_itself(weight):
    """A huge token must not coarsen its neighbours."""
    x = make(6, weight.shape[1])
    loud = x.clone()
    loud[2] *= 1e4
    with torch.inference_mode():
        got = F.linear(loud, weight)
    check(got[:2], loud[:2], weight)
    check(got[3:], loud[3:], weight)


def test_input_that_is_quantized_is_dequantized(fmt, weight):
    x = formats.get("fp8_e4m3").quantize(make(7, weight.shape[1]))
    with torch.inference_mode():
        check(F.linear(x, weight), x.dequantize(), weight)
        check(linear(x, weight), x.dequantize(), weight)


def test_transposed_weight_multiplies_as_its_values(fmt):
    """Not through a kernel that would take the scales of rows for those of columns."""
    weight = weight_of(fmt.name, (256, 256))
    x = make(5, 256)
    want = x.double() @ weight.dequantize().double()
    with torch.no_grad():
        assert error(F.linear(x, weight.t()), want) <= 1e-6
        assert error(x @ weight, want) <= 1e-6
        assert error(torch.addmm(torch.zeros(256), x, weight), want) <= 1e-6


def test_each_backend_that_can_run_here_agrees_with_the_reference(weight):
    x, bias = make(40, weight.shape[1]), make(weight.shape[0], seed=2)
    names = {b.name for b in registry.backends(OP)}
    ran = set()
    for name in names:
        try:
            backend_of(weight, name)
        except registry.NoBackendError:
            continue
        ran.add(name)
        check(linear(x, weight, bias, backend=name), x, weight, bias, name)
    assert "reference" in ran


def test_reference_knows_every_scheme(fmt):
    reference = next(b for b in registry.backends(OP) if b.name == "reference")
    assert fmt.layout.scheme in reference.needs.schemes


def test_schemes_of_backends_are_those_of_formats():
    schemes = {formats.get(name).layout.scheme for name in formats.names()} | set(GROUPS)
    for backend in registry.backends(OP):
        assert backend.needs.schemes <= schemes


def test_reference_is_the_last_resort():
    assert registry.backends(OP)[-1].name == "reference"


@pytest.mark.parametrize("features", [1, 255, 257])
def test_wrong_number_of_features_is_named(fmt, features):
    weight = weight_of(fmt.name, (33, 256))
    with pytest.raises(ValueError, match=rf"input has {features} features, weight \[33, 256\]"):
        linear(torch.ones(2, features), weight)


def test_unknown_backend_is_refused_even_for_an_empty_batch(fmt):
    weight = weight_of(fmt.name, (33, 256))
    with pytest.raises(ValueError, match="unknown backend 'cutlass'"):
        linear(torch.ones(0, 256), weight, backend="cutlass")


def test_named_backend_without_its_device_raises():
    weight = weight_of("fp8_e4m3", (256, 256))
    with pytest.raises(registry.NoBackendError, match="kitchen: needs a device of"):
        linear(torch.ones(2, 256), weight, backend="kitchen")


@pytest.mark.parametrize("gates", [None, 1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_residual_come_after_the_product(fmt, gates, dtype):
    weight = weight_of(fmt.name, SHAPES[1])
    x, residual = make(2, 3, 256, dtype=dtype), make(2, 3, 33, dtype=dtype, seed=2)
    gate = None if gates is None else make(gates, 33, dtype=dtype, seed=3)
    before = residual.clone()
    got = linear(x, weight, gate=gate, residual=residual)
    rows = 1.0 if gate is None else gate.double().repeat_interleave(6 // gates, 0).view(-1, 33)
    out = linear(x, weight).double().view(6, 33) * rows
    want = (residual.double().view(6, 33) + out).view(2, 3, 33)
    assert (got.dtype, got.shape) == (dtype, want.shape)
    assert error(got, want) <= 2 * torch.finfo(dtype).eps
    assert torch.equal(residual, before)
    if gate is not None:
        assert error(linear(x, weight, gate=gate), out.view(2, 3, 33)) <= 2 * torch.finfo(dtype).eps
