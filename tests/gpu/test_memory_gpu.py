"""A GPU whose memory really runs out: the layer is quantized all the same, and it is said."""

import pytest
import torch

from lowbit.quant import formats
from lowbit.quant.memory import quantize_within_memory

N, K = 8192, 8192


@pytest.fixture
def little_memory():
    """Only half of the weight's bytes, beside what is in use, are left to this process."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + N * K
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_weight_that_does_not_fit_is_quantized_on_the_cpu(little_memory, name):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    fmt = formats.get(name)
    got, error, note = quantize_within_memory(fmt, weight, "cuda")
    want, want_error = fmt.quantize_measured(weight)
    assert "quantized on the CPU, as the memory of cuda ran out" in note
    assert error == want_error and got.device.type == "cpu"
    assert torch.equal(got._qdata.view(torch.uint8), want._qdata.view(torch.uint8))


def test_weight_that_fits_stays_on_the_gpu():
    got, _, note = quantize_within_memory(formats.get("int8"), torch.randn(64, 64), "cuda")
    assert (note, got.device.type) == ("", "cuda")
