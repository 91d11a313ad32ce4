"""Where kernels of Hopper's own instructions run."""

import pytest
import torch

import lowbit.ops.linear  # noqa: F401, registers its backends
from lowbit.ops import registry
from lowbit.ops.attention import OP as ATTENTION
from lowbit.ops.cuda import hopper, nvrtc
from lowbit.ops.fp4_scaled_mm import OP as FEW
from lowbit.ops.scaled_mm import OP as MANY

CUDA = torch.device("cuda", 0)
BACKENDS = [b for op in (ATTENTION, MANY, FEW, "linear") for b in registry.backends(op)]


@pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b.name == "hopper"], ids=lambda backend: backend.op
)
def test_every_backend_of_that_name_is_refused_elsewhere(monkeypatch, backend):
    monkeypatch.setattr(hopper, "capability", lambda device: (10, 0))
    reason = backend.needs.self_test(CUDA)
    assert reason == "needs compute capability (9, 0), got (10, 0)"


@pytest.mark.parametrize("reason", [None, "no NVRTC"])
def test_on_hopper_nvrtc_decides(monkeypatch, reason):
    monkeypatch.setattr(hopper, "capability", lambda device: hopper.HOPPER)
    monkeypatch.setattr(nvrtc, "missing", lambda: reason)
    assert hopper.missing(CUDA) == reason


def test_without_nvrtc_there_is_a_reason():
    if torch.version.cuda:
        pytest.skip("torch was built with CUDA, and may have it")
    assert nvrtc.missing() == "torch was built without CUDA"
