"""`linear` prepares a product once: later ones of its kind are launches with their own tensors."""

from dataclasses import replace

import pytest
import torch

from lowbit.ops import launch, registry, replay, tuning
from lowbit.ops.cuda.nvrtc import Kernel
from lowbit.ops.linear import hopper as hopper_linear
from lowbit.ops.linear import linear, quantize_activation
from lowbit.ops.scaled_mm import hopper
from lowbit.quant import formats
from tests.ops.recorded import only_launches

K, N = 512, 96


@pytest.fixture
def prepared(monkeypatch):
    """Shapes for which the only backend was run: on the CPU, it launches two functions of torch."""
    seen = []

    def multiply(a, scale_a, b, scale_b, out):
        out.copy_((a.float() * scale_a) @ (b.float() * scale_b).t())

    def finish(out, bias, gate, residual):
        out.add_(0 if bias is None else bias).mul_(1 if gate is None else gate[:1])
        out.add_(0 if residual is None else residual)

    def run(x, weight, bias, *, low_rank, gate, residual):
        seen.append(tuple(x.stored.shape))
        assert low_rank is None
        out = replay.empty((len(x.stored), weight.shape[0]), x.dtype, x.device)
        operands = (x.stored, x.scale, weight._qdata, weight._params.scale, out)
        replay.launch(multiply, 1, operands, {}, "multiply", x.device)
        replay.launch(finish, 1, (out, bias, gate, residual), {}, "finish", x.device)
        return out

    def first(kernel, programs, arguments, options, key, device):
        kernel(*arguments)
        return kernel

    monkeypatch.setattr(launch, "launch", first)
    monkeypatch.setattr(launch, "again", lambda kernel, programs, given, device: kernel(*given))
    needs = registry.Needs(frozenset({"int8_row", "fp8_tensor", "fp8_row"}))
    does = {"quantizes": True, "fuses": True, "launches": True}
    only = registry.Backend("linear", "stand_in", 0, needs, None, run, **does)
    monkeypatch.setitem(registry._BACKENDS, "linear", [only])
    tuning.forget()
    with only_launches():
        yield seen
    tuning.forget()


def make(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def tensors(name: str, seed: int, gated: bool):
    weight = formats.get(name).quantize(make(N, K, seed=seed) * 0.05)
    gate = make(1, N, seed=seed + 2) if gated else None
    residual = make(2, 9, N, seed=seed + 3) if gated else None
    return make(2, 9, K, seed=seed + 4), weight, make(N, seed=seed + 1), gate, residual


def wanted(x, weight, bias, gate, residual) -> torch.Tensor:
    rows = quantize_activation(x, weight).dequantize().float()
    out = rows @ weight.dequantize().float().t() + bias
    return out if gate is None else residual + gate * out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("early", [False, True], ids=["floats", "quantized"])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e4m3_rowwise"])
@torch.inference_mode()
def test_products_of_one_kind_are_prepared_once(prepared, name, early, gated):
    for seed in (0, 10, 20):
        x, weight, bias, gate, residual = tensors(name, seed, gated)
        given = quantize_activation(x, weight) if early else x
        got = linear(given, weight, bias, gate=gate, residual=residual)
        assert got.shape == (2, 9, N)
        torch.testing.assert_close(
            got.float(), wanted(x, weight, bias, gate, residual), rtol=0.01, atol=0.02
        )
    assert prepared == [(18, K)]


@torch.inference_mode()
def test_another_kind_is_prepared_anew(prepared):
    x, weight, bias, gate, residual = tensors("int8", 0, True)
    rows = quantize_activation(x, weight)
    linear(rows, weight, bias)
    linear(rows, weight)
    linear(rows, weight, bias, gate=gate, residual=residual)
    linear(rows, weight.to(torch.bfloat16), bias)
    linear(quantize_activation(x[:1], weight), weight, bias)
    assert len(prepared) == 5
    tuning.forget()
    linear(rows, weight, bias)
    assert len(prepared) == 6


@torch.inference_mode()
def test_what_does_not_fit_is_refused_each_time(prepared):
    x, weight, _, gate, residual = tensors("int8", 0, True)
    rows = quantize_activation(x, weight)
    for _ in range(2):
        with pytest.raises(ValueError, match="residual is"):
            linear(rows, weight, gate=gate, residual=residual.flatten(0, 1))
        with pytest.raises(ValueError, match="gate is"):
            linear(rows, weight, gate=gate[:, 1:], residual=residual)
    assert not prepared


def test_gradients_do_not_see_a_prepared_product(prepared):
    """Where autograd listens, nothing is launched behind its back."""
    x, weight, bias, _, _ = tensors("int8", 0, False)
    rows = quantize_activation(x, weight)
    for _ in range(2):
        linear(rows, weight, bias)
    assert len(prepared) == 2


class Stand(Kernel):
    """What the Hopper kernel does with what it is started with, on the CPU."""

    def __init__(self):
        self.started = []

    def start(self, programs, arguments):
        scale_a, scale_b, bias, gate, out, a, b, residual, *numbers = arguments
        value = (a.float() * scale_a) @ (b.float().t() * scale_b.reshape(1, -1))
        value += 0 if bias is None else bias
        out.copy_(value if gate is None else residual + gate * value)
        self.started.append((programs, tuple(numbers)))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e4m3_rowwise"])
@torch.inference_mode()
def test_product_of_hopper_is_prepared_once(monkeypatch, name, gated):
    kernel, prepared, run = Stand(), [], hopper.run
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(hopper, "_processors", lambda device: 4)
    monkeypatch.setattr(hopper._Product, "load", lambda self, device, variant: kernel)
    monkeypatch.setattr(launch, "_compiled", {})
    needs = registry.Needs(hopper.NEEDS.schemes)
    only = registry.Backend(
        *("scaled_mm", "hopper", 0, needs, lambda *given: prepared.append(1) or run(*given))
    )
    monkeypatch.setitem(registry._BACKENDS, "scaled_mm", [only])
    (ours,) = (b for b in registry.backends("linear") if b.name == hopper_linear.PRODUCT)
    anywhere = replace(ours, needs=registry.Needs(ours.needs.schemes))
    monkeypatch.setitem(registry._BACKENDS, "linear", [anywhere])
    tuning.forget()
    with only_launches() as launches:
        for seed in (0, 10, 20):
            x, weight, bias, gate, residual = tensors(name, seed, gated)
            rows = quantize_activation(x, weight)
            got = linear(rows, weight, bias, gate=gate, residual=residual)
            torch.testing.assert_close(
                got.float(), wanted(x, weight, bias, gate, residual), rtol=0.01, atol=0.02
            )
    tuning.forget()
    # Once prepared, launched three times, with the same numbers.
    assert prepared == [1] and len(kernel.started) == 3 and len(set(kernel.started)) == 1
    assert kernel.started[0] == (1, (N if gated else 0, 18, N, 4, 0, 1, 18 if gated else 0, 16))
    assert launches[-1] == 1
