"""Calls that nobody watches are checked once for each kind of arguments, and no kind less."""

import pytest
import torch

from lowbit.ops.scaled_mm import scaled_mm
from lowbit.ops.scaled_mm.check import _right


def operands(m: int = 3, n: int = 5, k: int = 32) -> dict:
    return {
        "a": torch.ones(m, k, dtype=torch.int8),
        "b": torch.ones(n, k, dtype=torch.int8),
        "scale_a": torch.ones(m, 1),
        "scale_b": torch.ones(n, 1),
        "bias": torch.zeros(n),
    }


@pytest.fixture(autouse=True)
def nothing_known():
    _right.clear()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"scale_a": torch.ones(4, 1)}, ValueError),
        ({"scale_b": torch.ones(5, 1).half()}, TypeError),
        ({"scale_b": torch.ones(5, 2)[:, :1]}, ValueError),
        ({"bias": torch.zeros(6)}, ValueError),
        ({"bias": torch.zeros(5, dtype=torch.int8)}, TypeError),
        ({"a": torch.ones(3, 64, dtype=torch.int8)[:, ::2]}, ValueError),
        ({"b": torch.ones(5, 32, dtype=torch.uint8)}, TypeError),
        ({"b": torch.ones(5, 32, dtype=torch.int8, device="meta")}, ValueError),
        ({"activation": "relu"}, ValueError),
        ({"activation": ["gelu_tanh"]}, ValueError),
        ({"out_dtype": torch.int8}, TypeError),
        ({"residual": torch.zeros(3, 4)}, ValueError),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_call_that_is_wrong_raises_after_one_that_was_right(wrong, error):
    for _ in range(2):
        assert scaled_mm(**operands()).eq(32).all()
        with pytest.raises(error, match=next(iter(wrong))):
            scaled_mm(**{**operands(), **wrong})
    assert len(_right) == 1


def test_kinds_are_remembered_only_where_nobody_watches():
    scaled_mm(**operands())
    assert not _right
    with torch.no_grad():
        scaled_mm(**operands())
    assert len(_right) == 1
