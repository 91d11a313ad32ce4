"""A GPU whose memory really runs out, and what attention takes of it beside its result."""

import pytest
import torch

from lowbit.ops.attention import attention, prepare
from lowbit.ops.attention.modes import MODES
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


# What attention takes beside its 8-bit copies: of them, for scales and sums; and whatever their
# size, for the sample, and where blocks share the keys of rows.
OF_COPIES, MORE_BYTES = 1 / 16, 20e6


def taken(run) -> tuple[int, object]:
    """Bytes that were in use at most while `run` ran, beyond those before; and its result."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    ("heads", "queries", "keys"),
    [(24, 7145, 7145), (40, 32760, 32760), (3, 4000, 9000), (1, 128, 20000), (24, 4096, 512)],
)
def test_attention_takes_its_copies_and_little_more(heads, queries, keys, mode):
    q, k, v = (
        torch.randn(1, n, heads, 128, device="cuda").bfloat16().transpose(1, 2)
        for n in (queries, keys, keys)
    )
    got, out = taken(lambda: attention(q, k, v, mode))
    tiles = prepare.count(queries) + prepare.count(keys) * (1 if mode == "exact" else 2)
    copies = heads * tiles * prepare.TILE * 128
    extra = got - out.numel() * out.element_size()
    assert copies <= extra <= copies * (1 + OF_COPIES) + MORE_BYTES
