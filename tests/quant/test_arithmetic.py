"""The words for what runs."""

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.linear import OP, with_arithmetic
from lowbit.quant import arithmetic, formats

CPU = torch.device("cpu")
WEIGHT = torch.linspace(-1, 1, 32 * 256).reshape(32, 256)


@pytest.fixture
def gpu(monkeypatch):
    """A function capability -> a call's words for (backend, scheme), comfy-kitchen's kernels on."""
    monkeypatch.setattr(arithmetic, "_kitchen_has_kernels", lambda: True)

    def on(capability):
        monkeypatch.setattr(registry, "capability", lambda device: capability)
        device = torch.device("cuda", 0)
        return lambda backend, scheme: arithmetic.of(
            backend, registry.Call(scheme, device, 256, 256)
        )

    return on


def test_every_scheme_has_words():
    schemes = {formats.get(name).layout.scheme for name in formats.names()}
    assert schemes == set(arithmetic.BY_SCHEME)


@pytest.mark.parametrize("name", formats.names())
def test_reference_is_emulation_even_on_a_gpu(gpu, name):
    words, emulated = gpu((9, 0))("reference", formats.get(name).layout.scheme)
    assert emulated and "dequantized" in words


def test_nothing_runs_on_tensor_cores_on_a_cpu():
    for name in formats.names():
        scheme = formats.get(name).layout.scheme
        call = registry.Call(scheme, CPU, 256, 256)
        words, emulated = arithmetic.of(registry.select(OP, call).name, call)
        assert emulated and "tensor cores" not in words


@pytest.mark.parametrize(
    ("backend", "scheme", "capability", "words"),
    [
        ("w4a8", "nvfp4", (9, 0), "W4A8 on FP8 tensor cores, few tokens W4A16"),
        ("w4a8", "mxfp4", (8, 9), "W4A8 on FP8 tensor cores, few tokens W4A16"),
        ("w4a8", "nvfp4", (8, 6), "W4A8 on INT8 tensor cores, few tokens W4A16"),
        ("w4a8_int8", "nvfp4", (9, 0), "W4A8 on INT8 tensor cores"),
        ("w4a8_fp8", "mxfp4", (9, 0), "W4A8 on FP8 tensor cores"),
        ("w4a16", "nvfp4", (8, 0), "W4A16 on bf16 tensor cores"),
        ("kitchen", "nvfp4", (10, 0), "W4A4 on FP4 tensor cores"),
        ("kitchen", "mxfp8", (12, 0), "W8A8 on MXFP8 tensor cores"),
        ("triton", "int8_row_convrot", (9, 0), "W8A8 on INT8 tensor cores"),
        ("torch", "fp8_row", (8, 9), "W8A8 on FP8 tensor cores"),
        ("kitchen", "convrot_w4a4", (8, 9), "W4A4 on INT4 tensor cores"),
        ("kitchen", "convrot_w4a4", (9, 0), "W4A4 on INT8 tensor cores, in 4-bit numbers"),
    ],
)
def test_arithmetic_is_named_for_what_it_really_does(gpu, backend, scheme, capability, words):
    assert gpu(capability)(backend, scheme) == (words, False)


@pytest.mark.parametrize(
    ("wish", "capability", "words"),
    [
        ("w4a16", (9, 0), "W4A16 on bf16 tensor cores"),
        ("w4a8", (9, 0), "W4A8 on FP8 tensor cores"),
        ("w4a8_exact", (9, 0), arithmetic.LEAST_ERROR),
        ("w4a8_exact", (8, 0), "W4A8 on INT8 tensor cores"),
        ("native", (10, 0), "W4A4 on FP4 tensor cores"),
    ],
)
def test_wish_is_named_for_what_it_really_does(gpu, wish, capability, words):
    gpu(capability)
    call = registry.Call("nvfp4", torch.device("cuda", 0), 256, 256)
    assert arithmetic.of_wish(wish, call) == (words, False)


def test_kitchen_without_kernels_is_emulation(gpu, monkeypatch):
    monkeypatch.setattr(arithmetic, "_kitchen_has_kernels", lambda: False)
    assert gpu((9, 0))("kitchen", "int8_row").emulated
    assert not gpu((9, 0))("triton", "int8_row").emulated


def test_summary_counts_layers_by_format_and_arithmetic():
    make = {name: formats.get(name).quantize(WEIGHT) for name in ("nvfp4", "int8")}
    text = arithmetic.summary([make["nvfp4"], make["int8"], make["nvfp4"]], CPU)
    assert text == (
        f"2 of nvfp4 weights, emulated: {arithmetic.DEQUANTIZED}; "
        "1 of int8 weights, emulated on the CPU: right, not fast"
    )
    assert arithmetic.summary([], CPU) == "no quantized layers"


def test_summary_follows_a_new_backend(monkeypatch):
    """Backends of 4-bit weights register themselves under the names of what they do."""
    known = registry.backends(OP)
    monkeypatch.setitem(registry._BACKENDS, OP, list(known))
    needs = registry.Needs(frozenset({"mxfp4"}))
    registry.register(registry.Backend(OP, "w4a8", 1, needs, lambda x, w, b: x))
    monkeypatch.setattr(registry, "capability", lambda device: (9, 0))
    weight = formats.get("mxfp4").quantize(WEIGHT)
    # A shape that no other test asks for: choices are remembered.
    text = arithmetic.summary([weight], torch.device("cuda", 7))
    assert text == "1 of mxfp4 weights, W4A8 on FP8 tensor cores, few tokens W4A16"


def test_wish_that_cannot_run_is_refused_with_the_reason(gpu):
    call = gpu((9, 0))
    assert call("w4a8", "nvfp4").words
    arithmetic.check("nvfp4", "auto", CPU)
    arithmetic.check("as_stored", "w4a8", CPU)
    with pytest.raises(registry.NoBackendError, match="w4a8: needs a device"):
        arithmetic.check("nvfp4", "w4a8", CPU)
    reason = r"kitchen: needs compute capability \(10, 0\)"
    with pytest.raises(registry.NoBackendError, match=reason):
        arithmetic.check("nvfp4", "native", torch.device("cuda", 5))


def test_wish_for_a_format_with_one_way_is_refused():
    with pytest.raises(ValueError, match="arithmetic w4a8 is for nvfp4, mxfp4, not for int8"):
        arithmetic.check("int8", "w4a8", CPU)
    with pytest.raises(ValueError, match="arithmetic is 'w2a2'"):
        arithmetic.check("nvfp4", "w2a2", CPU)


def test_summary_counts_the_layers_of_each_kind_of_8_bits(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(registry, "_has_package", lambda name: True)
    monkeypatch.setattr(registry, "_wrong_version", lambda needs: None)
    plain = formats.get("nvfp4").quantize(WEIGHT)
    weights = [with_arithmetic(plain, w) for w in ("w4a8_int8", "w4a8_fp8", "w4a8_int8", "w4a8")]
    text = arithmetic.summary(weights, torch.device("cuda", 4))
    assert text == (
        "2 of nvfp4 weights, W4A8 on INT8 tensor cores; "
        "2 of nvfp4 weights, W4A8 on FP8 tensor cores"
    )


def test_summary_names_what_a_weight_wishes_for(gpu):
    gpu((9, 0))
    weight = with_arithmetic(formats.get("nvfp4").quantize(torch.ones(48, 256)), "w4a16")
    text = arithmetic.summary([weight], torch.device("cuda", 6))
    assert text == "1 of nvfp4 weights, W4A16 on bf16 tensor cores"
