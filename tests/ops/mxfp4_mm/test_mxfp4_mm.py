"""W4A4 of MXFP4: its numerics on the CPU, who may run the kernel, what is refused."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor
from triton.runtime.errors import OutOfResources

from lowbit.ops import registry, tuning
from lowbit.ops.linear import OP as LINEAR
from lowbit.ops.linear import linear, w4a4, with_arithmetic
from lowbit.ops.linear.four_bit import four_bit
from lowbit.ops.mxfp4_mm import OP, mxfp4_mm
from lowbit.ops.mxfp4_mm.triton import NEEDS
from lowbit.quant import formats

MXFP4 = formats.get("mxfp4")


def make(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(n: int = 33, k: int = 512) -> QuantizedTensor:
    return MXFP4.quantize(make(n, k, seed=1) * 0.02)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "k"), [(1, 512), (63, 250), (7, 1)])
def test_product_is_that_of_both_in_mxfp4(dtype, tokens, k):
    x, weight, bias = make(tokens, k, dtype=dtype), weight_of(k=k), make(33, seed=2)
    rounded = MXFP4.quantize(x.float()).dequantize()
    for given in (bias, None):
        got = w4a4.run(x, weight, given, "reference")
        want = rounded.double() @ weight.dequantize().double().t()
        want = want if given is None else want + given.double()
        assert (got.shape, got.dtype) == ((tokens, 33), dtype)
        assert torch.equal(got, want.to(dtype))


def test_both_roundings_show_in_the_error():
    """A format's error twice, in squares; one alone would be a product that rounds less."""
    plain = make(64, 2048, seed=1) * 0.02
    x, weight = make(200, 2048), MXFP4.quantize(plain)
    got = error(w4a4.run(x, weight, None, "reference"), x.double() @ plain.double().t())
    one = error(weight.dequantize(), plain)
    assert got == pytest.approx(2**0.5 * one, rel=0.05)


def test_what_is_not_finite_makes_its_token_nan_and_no_other():
    x, weight = make(5, 512), weight_of()
    clean = w4a4.run(x, weight, None, "reference")
    x[2, 300] = torch.inf
    got = w4a4.run(x, weight, None, "reference")
    assert got[2].isnan().all()
    got[2] = clean[2]
    assert torch.equal(got, clean)


def test_inputs_stay_and_any_strides_do():
    x, weight = make(8, 512), weight_of()
    tall = torch.full((16, 1024), torch.nan)
    tall[::2, ::2] = x
    before = x.clone()
    assert torch.equal(
        w4a4.run(tall[::2, ::2], weight, None, "reference"),
        w4a4.run(x, weight, None, "reference"),
    )
    assert torch.equal(x, before)


def test_kernel_is_for_gpus_with_the_instructions_when_named(monkeypatch):
    monkeypatch.setattr(registry, "_has_package", lambda name: True)
    monkeypatch.setattr(registry, "_wrong_version", lambda needs: None)
    monkeypatch.setattr(registry, "_self_test", lambda test, device: None)
    weight = with_arithmetic(weight_of(), "native")
    for major in (9, 10, 12):
        monkeypatch.setattr(registry, "capability", lambda device, has=major: (has, 0))
        call = registry.Call("mxfp4", torch.device("cuda", major), 5120, 5120)
        assert registry.select(LINEAR, call).name != "w4a4"
        assert registry.select(OP, call).name == "reference"
        reason = registry.unmet(NEEDS, call)
        if major > 9:
            assert reason is None and registry.select(LINEAR, call, "w4a4").name == "w4a4"
            continue
        with pytest.raises(registry.NoBackendError, match=r"w4a4: needs compute capability \(10,"):
            registry.select(LINEAR, call, "w4a4")
    with pytest.raises(registry.NoBackendError, match="w4a4: needs a device of"):
        linear(make(5, 512), weight)


def test_what_fails_its_trial_is_refused_with_the_reason(monkeypatch):
    """On this CPU the kernel cannot run at all, which is one reason; a wrong result is another."""
    assert "needs a device" in w4a4.self_test(torch.device("cpu"))
    real = mxfp4_mm

    def sabotaged(*given, backend):
        return real(*given, backend="reference") * (1 if backend == "reference" else 1.1)

    monkeypatch.setattr(w4a4, "mxfp4_mm", sabotaged)
    assert w4a4.self_test(torch.device("cpu")) == "errs by 0.10 here"
    monkeypatch.setattr(w4a4, "mxfp4_mm", lambda *g, backend: real(*g, backend="reference"))
    assert w4a4.self_test(torch.device("cpu")) is None

    def fails(*given, backend):
        if backend == "triton":
            raise OutOfResources(300, 227, "shared memory")
        return real(*given, backend=backend)

    monkeypatch.setattr(w4a4, "mxfp4_mm", fails)
    reason = w4a4.self_test(torch.device("cpu"))
    assert reason.startswith("fails here: OutOfResources: out of resource: shared memory")


def test_what_does_not_fit_is_refused():
    w = four_bit(weight_of())
    given = (w.packed, w.scale, w.shape)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[5, 511\]; \[M, 512\]"):
        mxfp4_mm(make(5, 511), *given)
    with pytest.raises(ValueError, match=r"bias is \[32\]; \[33\]"):
        mxfp4_mm(make(5, 512), *given, make(32))
    with pytest.raises(ValueError, match="bias is on meta, the weight on cpu"):
        mxfp4_mm(make(5, 512), *given, make(33).to("meta"))
    with pytest.raises(ValueError, match="511 elements"):
        mxfp4_mm(make(5, 512), w.packed, w.scale.reshape(-1)[:511], w.shape)


def test_product_is_one_step_of_a_graph():
    x, w = make(20, 512), four_bit(weight_of())

    def run(x):
        return mxfp4_mm(x * 2, w.packed, w.scale, w.shape, backend="reference") + 1

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize("below", [False, True], ids=["linear", "F.linear"])
def test_trial_may_be_asked_for_first_by_a_compiled_graph(monkeypatch, below):
    """Traced, it would be compared as a number that nobody knows yet."""
    real = mxfp4_mm

    def by_reference(x, packed, scale, shape, bias=None, backend=None):
        return real(x, packed, scale, shape, bias, "reference")

    monkeypatch.setattr(w4a4, "mxfp4_mm", by_reference)
    found = next(b for b in registry.backends(LINEAR) if b.name == "w4a4")
    on_cpu = dataclasses.replace(
        found.needs, devices=frozenset(), capability=None, package_min=None
    )
    here = dataclasses.replace(found, needs=on_cpu)
    monkeypatch.setitem(registry._BACKENDS, LINEAR, [here])
    weight, x = with_arithmetic(weight_of(), "native"), make(4, 512)
    layer = F.linear if below else linear
    registry._self_test.cache_clear()
    tuning.forget()
    torch._dynamo.reset()
    try:
        with torch.inference_mode():
            compiled = torch.compile(
                lambda x: layer(x, weight), fullgraph=True, backend="aot_eager"
            )
            got = compiled(x)
            assert torch.equal(got, w4a4.run(x, weight, None, "reference"))
    finally:
        registry._self_test.cache_clear()
        tuning.forget()
