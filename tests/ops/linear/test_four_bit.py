"""4-bit weights in 16 and in 8 bits, with our kernels' reference in their place; who is chosen."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

from lowbit.ops import registry
from lowbit.ops.fp4_mm import fp4_mm
from lowbit.ops.launch import TRITON_MIN
from lowbit.ops.linear import (
    OP,
    linear,
    quantize_activation,
    release,
    share,
    w4a8,
    w4a16,
    with_arithmetic,
)
from lowbit.ops.linear import activation as activation_module
from lowbit.ops.linear.activation import Kind
from lowbit.ops.linear.arithmetic import arithmetic_of, backend_named
from lowbit.ops.linear.four_bit import FEW_ROWS, GROUPS, four_bit
from lowbit.quant import formats

CUDA = torch.device("cuda", 0)
FP8, INT8 = Kind(torch.float8_e4m3fn, 0), Kind(torch.int8, 256)
INTERLEAVED = Kind(torch.float8_e4m3fn, 0, True)
NAMES = [name for name in formats.names() if formats.get(name).layout.scheme in GROUPS]
# The relative error of activations of those kinds, and of weights in that kind.
KIND_ERROR = {FP8: 0.03, INT8: 0.015, Kind(torch.int8, 0): 0.015}


def make(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def weight_of(name: str, n: int = 33, k: int = 512, dtype=torch.float32) -> QuantizedTensor:
    return formats.get(name).quantize((make(n, k, seed=1) * 0.02).to(dtype))


def exact(x: torch.Tensor, weight: QuantizedTensor, bias=None) -> torch.Tensor:
    w = weight.to(dtype=torch.float32).dequantize()
    return F.linear(x.double(), w.double(), None if bias is None else bias.double())


def run_w4a8(x, weight, bias=None, kind=None):
    rows = quantize_activation(x, weight, kind=kind, backend="reference")
    return w4a8.run_quantized(rows, weight, bias, "reference")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [0, 1, 17, 63, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("k", [512, 250])
def test_w4a16_is_float64_rounded_once(name, tokens, dtype, k):
    x, weight, bias = make(tokens, k, dtype=dtype), weight_of(name, k=k), make(33, seed=2)
    for given in (bias, None):
        got = w4a16.run(x, weight, given, "reference")
        assert (got.shape, got.dtype) == ((tokens, 33), dtype)
        want = exact(x, weight, given)
        # The weight's values are float32, whose rounding comes on top.
        bound = torch.finfo(dtype).eps / 2 * want.abs() + 2e-6 * want.abs().max() if tokens else 0
        assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [FP8, INT8, Kind(torch.int8, 0)], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 63])
def test_w4a8_errs_as_the_activation_and_the_new_weight_do(name, kind, tokens):
    x, weight, bias = make(2, tokens, 512), weight_of(name), make(33, seed=2)
    got = run_w4a8(x, weight, bias, kind)
    want = exact(x.reshape(-1, 512), weight, bias)
    assert (got.shape, got.dtype) == ((2 * tokens, 33), torch.float32)
    assert error(got, want) <= KIND_ERROR[kind]


@pytest.mark.parametrize("name", NAMES)
def test_w4a8_errs_at_most_8_percent_more_than_w4a16(name):
    plain = make(64, 2048, seed=1) * 0.02
    x, weight = make(100, 2048), formats.get(name).quantize(plain)
    x[:, ::97] *= 10
    want = x.double() @ plain.double().t()
    least = error(w4a16.run(x, weight, None, "reference"), want)
    for kind in (FP8, INT8):
        assert error(run_w4a8(x, weight, kind=kind), want) <= 1.08 * least


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 40, 250])
def test_inputs_that_are_no_multiple_of_16_are_padded(name, k):
    x, weight = make(5, k, dtype=torch.bfloat16), weight_of(name, k=k)
    for got in (run_w4a8(x, weight), w4a16.run(x, weight, None, "reference")):
        assert got.shape == (5, 33)
        assert error(got, exact(x, weight)) <= KIND_ERROR[FP8] + 2**-8


@pytest.mark.parametrize("name", NAMES)
def test_activation_of_either_kind_is_multiplied_and_others_are_refused(name):
    x, weight = make(5, 512), weight_of(name)
    assert quantize_activation(x, weight).kind == FP8
    for bad in (Kind(torch.int8, 64), Kind(torch.float8_e4m3fn, 256)):
        with pytest.raises(ValueError, match="do not multiply"):
            quantize_activation(x, weight, kind=bad)
    # Here, where no backend multiplies 8 bits, an activation is dequantized first.
    got = linear(quantize_activation(x, weight, kind=INT8), weight)
    assert error(got, exact(x, weight)) <= KIND_ERROR[INT8]


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that pretends a GPU of some capability, with Triton installed."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(registry, "capability", lambda device: (major, minor))
        monkeypatch.setattr(registry, "_has_package", lambda name: True)
        monkeypatch.setattr(registry, "_version", lambda name: TRITON_MIN)
        monkeypatch.setattr(registry, "_self_test", lambda test, device: None)

    registry.select.cache_clear()
    yield pretend
    registry.select.cache_clear()


def chosen(scheme: str, few: bool, name: str = "auto") -> str:
    return registry.select(OP, registry.Call(scheme, CUDA, 5120, 5120, few=few), name).name


@pytest.mark.parametrize("scheme", GROUPS)
def test_auto_goes_by_the_number_of_tokens_on_hopper(gpu, scheme):
    gpu(9, 0)
    assert chosen(scheme, True) == "w4a16"
    assert chosen(scheme, False) == "w4a8"
    assert chosen(scheme, False, "w4a16") == "w4a16"
    assert chosen(scheme, True, "w4a8") == "w4a8"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_where_nothing_was_measured_ours_runs_when_named(gpu, capability):
    gpu(*capability)
    assert chosen("nvfp4", False) == "reference"
    assert {chosen("nvfp4", few, name) for few in (True, False) for name in ("w4a8",)} == {"w4a8"}
    assert chosen("nvfp4", True, "w4a16") == "w4a16"


def test_blackwell_multiplies_four_bits_itself(gpu):
    gpu(12, 0)
    assert chosen("nvfp4", True) == chosen("nvfp4", False) == "kitchen"


def test_native_is_refused_with_the_reason_elsewhere(gpu):
    gpu(9, 0)
    with pytest.raises(registry.NoBackendError, match=r"kitchen: needs compute capability \(10, 0"):
        chosen("nvfp4", False, backend_named("native", "nvfp4"))
    with pytest.raises(registry.NoBackendError, match=r"w4a4: needs compute capability \(10, 0"):
        chosen("mxfp4", False, backend_named("native", "mxfp4"))


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_w4a8_is_int8_where_there_is_no_fp8(gpu, capability):
    gpu(*capability)
    weight = weight_of("nvfp4")
    kind = activation_module.kind_on(CUDA, weight, 512)
    assert kind == (INT8 if capability == (8, 6) else FP8)
    assert activation_module.kind_on(CUDA, weight_of("nvfp4", k=250), 512).rotation == 0


@pytest.mark.parametrize("name", NAMES)
def test_activations_of_few_tokens_are_interleaved_on_hopper(gpu, name):
    gpu(9, 0)
    kinds = [activation_module.kind_on(CUDA, weight_of(name, 40), m) for m in (65, 512, 32760)]
    assert kinds == [INTERLEAVED, INTERLEAVED, FP8]
    for n, k in ((40, 448), (44, 512)):
        assert activation_module.kind_on(CUDA, weight_of(name, n, k), 512) == FP8


@pytest.mark.parametrize("name", NAMES)
def test_interleaved_activation_is_the_one_in_order(name):
    x, weight, bias = make(2, 7, 512), weight_of(name), make(33, seed=2)
    plain, moved = (quantize_activation(x, weight, kind=kind) for kind in (FP8, INTERLEAVED))
    assert not torch.equal(plain.stored.view(torch.uint8), moved.stored.view(torch.uint8))
    assert torch.equal(moved.in_order().view(torch.uint8), plain.stored.view(torch.uint8))
    assert torch.equal(moved.dequantize(), plain.dequantize())
    got, want = (w4a8.run_quantized(a, weight, bias, "reference") for a in (moved, plain))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # Here, where no backend multiplies 8 bits.
    assert torch.equal(linear(moved, weight), linear(plain, weight))
    # Other formats have no use for it.
    with pytest.raises(ValueError, match="the activation is"):
        linear(moved, weight_of("fp8_e4m3"))
    with pytest.raises(ValueError, match="do not multiply"):
        quantize_activation(make(5, 448), weight_of(name, k=448), kind=INTERLEAVED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arithmetic", ["w4a16", "w4a8", "native", "w4a8_int8"])
def test_arithmetic_survives_what_happens_to_a_weight(name, arithmetic):
    plain = weight_of(name, dtype=torch.bfloat16)
    weight = with_arithmetic(plain, arithmetic)
    assert weight._qdata is plain._qdata and formats.of(weight) is formats.get(name)
    moved = [
        weight.clone(),
        weight.detach(),
        weight.to(torch.float16),
        torch.empty_like(weight),
        nn.Parameter(weight, requires_grad=False),
        QuantizedTensor(
            weight._qdata,
            weight._layout_cls,
            dataclasses.replace(weight._params, orig_dtype=torch.float32),
        ),
        # As ComfyUI does after a LoRA.
        weight.requantize_from_float(
            weight.dequantize(), scale="recalculate", stochastic_rounding=3
        ),
    ]
    assert [arithmetic_of(w) for w in moved] == [arithmetic] * len(moved)
    assert arithmetic_of(with_arithmetic(weight, "auto")) == "auto"
    with torch.no_grad():
        got = copy.copy(moved[0]).copy_(weight)
    assert torch.equal(got.dequantize(), plain.dequantize())
    fmt = formats.get(name)
    assert fmt.pack(weight).keys() == fmt.pack(plain).keys()


@pytest.mark.parametrize("arithmetic", ["w4a16", "w4a8", "native"])
def test_a_wish_that_cannot_be_met_is_an_error(arithmetic):
    weight = with_arithmetic(weight_of("nvfp4"), arithmetic)
    with pytest.raises(registry.NoBackendError, match="needs a device of"):
        F.linear(make(5, 512), weight)
    # The caller's word goes before the weight's.
    assert torch.equal(
        linear(make(5, 512), weight, backend="reference"), linear(make(5, 512), weight_of("nvfp4"))
    )


def test_arithmetic_is_for_four_bits_and_by_known_names():
    with pytest.raises(ValueError, match="'w4a4'; auto, w4a16, w4a8, native, w4a8_exact, "):
        with_arithmetic(weight_of("nvfp4"), "w4a4")
    with pytest.raises(ValueError, match="not int8_row"):
        with_arithmetic(weight_of("int8"), "w4a8")


@pytest.fixture
def ours(monkeypatch):
    """Let W4A8 run here, by the reference; return its quantizations."""
    calls = []

    def run(x, weight, bias):
        return w4a8.run_quantized(x, weight, bias, "reference")

    backend = registry.Backend(OP, "ours", 0, registry.Needs(frozenset()), run, run, quantizes=True)
    select = registry.select

    def chosen(op, call, name="auto"):
        if op == "quantize_rows":
            calls.append(call)
        return backend if op == OP else select(op, call, name)

    monkeypatch.setattr(registry, "select", chosen)
    return calls


def test_layers_share_one_activation_of_a_four_bit_weight(ours):
    x, weight = make(6, 512), weight_of("nvfp4")
    alone = linear(x, weight)
    ours.clear()
    share(x, 3)
    for _ in range(3):
        assert torch.equal(linear(x, weight), alone)
        release(x)
    assert len(ours) == 1


def test_gelu_joins_the_quantizer_of_a_four_bit_weight(ours):
    x, weight = make(6, 512), weight_of("nvfp4")
    got = linear(x, weight, input_act="gelu_tanh")
    want = exact(F.gelu(x, approximate="tanh"), weight)
    assert len(ours) == 1 and error(got, want) <= KIND_ERROR[FP8] + 0.01


def test_few_tokens_are_told_to_the_registry(monkeypatch):
    seen = []
    select = registry.select
    monkeypatch.setattr(
        registry, "select", lambda op, call, n="auto": seen.append(call) or select(op, call, n)
    )
    for tokens in (FEW_ROWS, FEW_ROWS + 1):
        linear(make(tokens, 512), weight_of("nvfp4"))
    linear(make(1, 512), weight_of("int8"))
    assert [call.few for call in seen if call.scheme in ("nvfp4", "int8_row")] == [
        True,
        False,
        None,
    ]


def test_both_products_are_one_graph_each():
    weight, x = weight_of("nvfp4"), make(20, 512)
    w = four_bit(weight)

    def sixteen(x):
        return (
            fp4_mm(x * 2, w.packed, w.scale, w.tensor_scale, w.shape, 16, backend="reference") + 1
        )

    def eight(x):
        return run_w4a8(x * 2, weight) + 1

    for run in (sixteen, eight):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), run(x))


def test_what_does_not_fit_the_16_bit_product_is_refused():
    w = four_bit(weight_of("nvfp4"))
    given = (w.packed, w.scale, w.tensor_scale, w.shape, 16)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[5, 511\]; \[M, 512\]"):
        fp4_mm(make(5, 511), *given)
    with pytest.raises(ValueError, match=r"bias is \[32\]; \[33\]"):
        fp4_mm(make(5, 512), *given, make(32))
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        fp4_mm(make(5, 512).to("meta"), *given)
