"""Counting NaN and Inf."""

import pytest
import torch

from lowbit.quant import finite

DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_is_looked_at_in_pieces(dtype, monkeypatch):
    monkeypatch.setattr(finite, "PIECE", 7)
    for count in (0, 1, 6, 7, 8, 50):
        value = torch.zeros(count)
        value[::3] = torch.nan
        value = value.to(dtype)
        assert finite.count_not_finite(value) == len(value[::3])
    assert finite.count_not_finite(torch.tensor(torch.nan).to(dtype)) == 1
    assert finite.count_not_finite(torch.full((3, 3), 127, dtype=torch.int8)) == 0
