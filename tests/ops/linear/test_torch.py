"""torch's FP8 product, which torch runs on a CPU too; there it is not chosen, being slow."""

import pytest
import torch

from lowbit.ops.linear import reference
from lowbit.ops.linear import torch as backend
from lowbit.quant import formats

ROWWISE = formats.get("fp8_e4m3_rowwise")


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16, 32), (7, 48, 64), (63, 32, 1024)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_product_agrees_with_the_reference(shape, dtype, biased):
    """Up to the rounding of the activation, which is that of the format, and of the bf16 result."""
    m, n, k = shape
    x, weight = make(m, k).to(dtype), ROWWISE.quantize(make(n, k, seed=1))
    bias = make(n, seed=2).to(dtype) if biased else None
    got, want = backend.run(x, weight, bias), reference.run(x.float(), weight, bias)
    assert got.shape == (m, n)
    bound = ROWWISE.max_error + torch.finfo(torch.bfloat16).eps
    assert (got.float() - want).norm() <= bound * want.norm()


def test_self_test_passes_where_the_product_is_right():
    assert backend.self_test(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (lambda *args, **kwargs: torch.zeros(32, 48), "errs by 1.00"),
        (lambda *args, **kwargs: torch.full((32, 48), torch.nan), "errs by nan"),
    ],
)
def test_self_test_names_a_wrong_result(monkeypatch, product, reason):
    monkeypatch.setattr(torch, "_scaled_mm", product)
    assert reason in backend.self_test(torch.device("cpu"))


def test_self_test_names_a_failure(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no rowwise scaling on this device")

    monkeypatch.setattr(torch, "_scaled_mm", fail)
    assert "no rowwise scaling" in backend.self_test(torch.device("cpu"))
