"""Tuning with the real kernel, in Triton's interpreter; `test_tune.py` runs this file."""

import pytest
import torch

from lowbit.ops import tuning
from lowbit.ops.scaled_mm import scaled_mm
from lowbit.ops.scaled_mm import triton as backend
from lowbit.quant.tune import Problem, products, tune
from tests.quant.tune.bench import GPU, bench, taken

M, N, K = 20, 40, 64


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_tile_that_wins_gives_the_right_product(cache, scheme):
    (result,) = tune([Problem(M, N, K)], bench(schemes=[scheme])).results
    assert result.winner and result.tried > 10
    assert not result.wrong and not result.failed
    tile = taken(scheme, M, N, K)
    assert tile != taken(scheme, M, N, K, None)
    assert (scheme, N, K, 32) in tuning.lookup("scaled_mm", GPU)
    generator = torch.Generator().manual_seed(1)
    a, b = (
        torch.randint(-100, 100, (rows, K), generator=generator).to(products.TYPES[scheme])
        for rows in (M, N)
    )
    one = torch.ones(1)
    out = torch.full((M, N), torch.nan)
    backend.run_tile(out, a, b, one, one, None, None, None, tile, GPU.processors)
    want = scaled_mm(a, b, one, one, out_dtype=torch.float32, backend="reference")
    torch.testing.assert_close(out, want)


def test_kernel_that_forgets_the_last_columns_is_found_out(cache, monkeypatch):
    def sabotaged(*, out, **others):
        backend.run_tile(out=out, **others)
        out[:, -1] = torch.nan

    monkeypatch.setattr(products, "run_tile", sabotaged)
    (result,) = tune([Problem(M, N, K)], bench(schemes=["int8"])).results
    assert result.wrong and not result.tried
    assert not tuning.lookup("scaled_mm", GPU)
