"""The linear layer of our kernels, with their reference in their place: what runs on a CPU."""

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.launch import TRITON_MIN
from lowbit.ops.linear import OP, reference
from lowbit.ops.linear import triton as backend
from lowbit.quant import formats

CUDA = torch.device("cuda", 0)
NAMES = ("fp8_e4m3", "fp8_e5m2", "fp8_e4m3_rowwise", "int8", "int8_convrot")
# The format whose round trip has the error of the activation's.
ROUNDS_LIKE = {"fp8_e5m2": "fp8_e4m3_rowwise", "fp8_e4m3": "fp8_e4m3_rowwise"}


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
def test_product_is_that_of_the_values_up_to_the_rounding_of_the_input(name, dtype, biased):
    x, weight = make(7, 512).to(dtype), formats.get(name).quantize(make(33, 512, seed=1))
    bias = make(33, seed=2) if biased else None
    got = backend.run(x, weight, bias, "reference")
    want = reference.run(x.float(), weight, bias)
    assert got.dtype == dtype
    bound = formats.get(ROUNDS_LIKE.get(name, name)).max_error + torch.finfo(dtype).eps
    assert (got.float() - want).norm() <= bound * want.norm()


@pytest.mark.parametrize("width", [16, 64])
def test_rotation_of_another_width_is_honoured(width):
    fmt = formats.get("int8_convrot")
    kwargs = {**fmt.quantize_kwargs, "convrot_groupsize": width}
    from comfy_kitchen.tensor import QuantizedTensor

    weight = QuantizedTensor.from_float(make(33, 512), fmt.layout.__name__, **kwargs)
    x = make(7, 512, seed=1)
    want = reference.run(x, weight, None)
    got = backend.run(x, weight, None, "reference")
    assert (got - want).norm() <= fmt.max_error * want.norm()


def test_int8_with_one_scale_for_the_tensor():
    fmt = formats.get("int8")
    stored = torch.randint(-127, 128, (33, 64), dtype=torch.int8)
    weight = fmt.unpack({"weight": stored, "weight_scale": torch.tensor(0.01)}, torch.float32)
    x = make(7, 64)
    want = reference.run(x, weight, None)
    got = backend.run(x, weight, None, "reference")
    assert (got - want).norm() <= fmt.max_error * want.norm()


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


def chosen(scheme: str, name: str = "auto", k: int = 5120) -> str:
    return registry.select(OP, registry.Call(scheme, CUDA, 5120, k), name).name


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_row", "int8_row", "int8_row_convrot"])
def test_auto_takes_our_kernels_where_they_were_measured(gpu, scheme):
    gpu(9, 0)
    assert chosen(scheme) == "triton"


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_elsewhere_they_run_when_named(gpu, capability):
    gpu(*capability)
    assert chosen("int8_row_convrot") == "kitchen"
    assert chosen("int8_row_convrot", "triton") == "triton"


def test_fp8_needs_a_gpu_that_has_it(gpu):
    gpu(8, 6)
    with pytest.raises(registry.NoBackendError, match=r"needs compute capability \(8, 9\)"):
        chosen("fp8_row", "triton")


def test_a_triton_without_descriptors_is_a_reason(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(registry, "_has_package", lambda name: "tensor_descriptor" not in name)
    with pytest.raises(registry.NoBackendError, match=r"tensor_descriptor is missing"):
        chosen("int8_row", "triton")


def test_too_old_a_triton_moves_auto_to_the_next_backend_and_says_so_once(gpu, monkeypatch, caplog):
    gpu(9, 0)
    monkeypatch.setattr(registry, "_version", lambda name: (3, 4, 0))
    registry._warn.cache_clear()
    assert [chosen("int8_row", k=k) for k in (256, 5120)] == ["kitchen", "kitchen"]
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == [
        "linear: without its triton backend, which needs triton 3.5 or later, got 3.4.0"
    ]
    with pytest.raises(registry.NoBackendError, match=r"needs triton 3\.5 or later, got 3\.4\.0"):
        chosen("int8_row", "triton")


def test_too_wide_a_layer_goes_to_the_next_backend(gpu):
    gpu(9, 0)
    assert chosen("int8_row", k=32768) == "kitchen"
