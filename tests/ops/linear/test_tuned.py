"""The linear layer with results of `lowbit tune`, on a CPU that passes for a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from lowbit.ops import registry, tuning
from lowbit.ops.linear import OP, LowRank, linear
from lowbit.ops.tuning import Entry, Gpu
from lowbit.quant import formats

GPU = Gpu("a GPU", (9, 0), 132)
N, K = 48, 256


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "gpu", lambda device: GPU)
    monkeypatch.setattr(tuning, "_used", {})
    tuning.forget()
    yield
    monkeypatch.undo()
    tuning.forget()


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(0)
    return formats.get("int8").quantize(torch.randn(N, K, generator=generator))


def prefer_reference(weight, m: int) -> None:
    entry = Entry(weight.layout_cls.scheme, N, K, m, m, "reference", 0.5, "kitchen", 0.75)
    tuning.save(OP, GPU, {entry.key: entry})


def rows(m: int) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(1))


def test_auto_multiplies_dequantized_where_that_was_faster(weight):
    """`reference` rounds no activation, so that its result tells which backend ran."""
    prefer_reference(weight, 16)
    few, many = rows(9), rows(17)
    assert torch.equal(linear(few, weight), linear(few, weight, backend="reference"))
    assert torch.equal(linear(many, weight), linear(many, weight, backend="kitchen"))
    assert not torch.equal(linear(many, weight), linear(many, weight, backend="reference"))
    assert torch.equal(
        linear(few, weight, backend="kitchen"), linear(rows(9), weight, None, "kitchen")
    )


def test_rows_are_those_of_all_dimensions_before_the_last(weight):
    prefer_reference(weight, 16)
    x = rows(3 * 4).reshape(3, 4, K)
    assert torch.equal(linear(x, weight), linear(x, weight, backend="reference"))


def test_no_rows_need_no_entry(weight):
    prefer_reference(weight, 1)
    assert linear(torch.empty(0, K), weight).shape == (0, N)


def compiled_graphs(weight, counts) -> int:
    """How many graphs torch.compile makes for inputs of so many rows, whose results are right."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: F.linear(x, weight) + 1, dynamic=True, backend=backend)
    with torch.inference_mode():
        for m in counts:
            x = rows(m)
            torch.testing.assert_close(run(x), F.linear(x, weight) + 1)
    return backend.frame_count


def test_compiled_graph_depends_on_rows_where_entries_do(weight):
    counts = (300, 400, 500, 600, 700)
    assert compiled_graphs(weight, counts) == 1
    prefer_reference(weight, 512)
    # Up to 512 and up to 768.
    assert compiled_graphs(weight, counts) == 2


def test_choice_of_backend_is_remembered_by_bucket_not_by_rows(weight):
    prefer_reference(weight, 512)
    for m in range(257, 513):
        linear(rows(m), weight)
    assert registry.select.cache_info().currsize == 1


def test_layer_with_a_low_rank_term_is_none_that_was_measured(weight):
    """A backend that won without a term may not take one, or be slow with it."""
    prefer_reference(weight, 64)
    x = rows(40)
    # A term of nothing: the results tell which backend made the product.
    term = LowRank(torch.zeros(8, K), torch.zeros(N, 8), torch.ones(()))
    assert torch.equal(linear(x, weight), linear(x, weight, backend="reference"))
    assert torch.equal(linear(x, weight, low_rank=term), linear(x, weight, backend="kitchen"))
