"""What scales alone prove of their order; in files: `dialects/test_order.py`."""

import pytest
import torch
from comfy_kitchen.float_utils import to_blocked

from lowbit.quant.scale_order import EITHER, FLAT, TWICE, wrong_order

SHAPES = [(256, 32), (512, 16), (1024, 64), (2560, 80)]


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_without_a_pattern_prove_nothing(shape):
    scale = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + 0.5
    assert wrong_order(scale.to(torch.float8_e4m3fn), *shape) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("along", ["rows", "columns", "heads", "both"])
def test_right_order_is_never_called_wrong(shape, size, along):
    noise = torch.Generator().manual_seed(2)
    scale = torch.randn(shape, generator=noise) * 0.1
    if along in ("rows", "both"):
        scale += size * torch.randn(shape[0], 1, generator=noise)
    if along in ("columns", "both"):
        scale += size * torch.randn(1, shape[1], generator=noise)
    if along == "heads":
        heads = size * torch.randn(shape[0] // 128, 1, generator=noise)
        scale += heads.repeat_interleave(128, dim=0)
    codes = scale.exp().to(torch.float8_e4m3fn).view(torch.uint8)
    stored = to_blocked(codes, flatten=False).view(torch.float8_e4m3fn)
    assert wrong_order(stored, *shape) is None


def test_order_of_large_scales_with_rows_is_told():
    noise = torch.Generator().manual_seed(3)
    scale = (0.2 * torch.randn(2560, 1, generator=noise)).exp() * torch.ones(1, 80)
    codes = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    once = to_blocked(codes, flatten=False)
    twice = to_blocked(once, flatten=False)
    as_scale = torch.float8_e4m3fn
    assert wrong_order(codes.view(as_scale), 2560, 80) in (FLAT, EITHER)
    assert wrong_order(once.view(as_scale), 2560, 80) is None
    assert wrong_order(twice.view(as_scale), 2560, 80) in (TWICE, EITHER)


def test_zero_scales_prove_nothing():
    assert wrong_order(torch.zeros(256, 32).to(torch.float8_e4m3fn), 256, 32) is None
