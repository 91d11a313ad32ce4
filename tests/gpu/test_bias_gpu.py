"""A mask of keys as the kernel of attention for Hopper reads it."""

import pytest
import torch

from lowbit.ops.attention import hopper
from lowbit.ops.attention.prepare import LOG2E
from lowbit.ops.cuda import nvrtc


@pytest.mark.parametrize("dtype", hopper.MASKS)
def test_bias_is_what_the_logits_gain(dtype):
    if reason := nvrtc.missing():
        pytest.skip(reason)
    b, h, keys = 2, 3, 300
    generator = torch.Generator("cuda").manual_seed(8)
    mask = torch.randn(b, keys, h, 1, generator=generator, device="cuda").bfloat16()
    mask = mask.permute(0, 2, 3, 1)
    mask[:, :, :, :128] = 0
    mask[0, 1] = 0
    if dtype == torch.bool:
        mask = mask >= 0
        want = torch.where(mask, 0.0, -torch.inf)
    else:
        mask[1, 2, 0, 130] = torch.nan
        mask[0, 2, 0, 131], mask[0, 2, 0, 299] = -torch.inf, torch.inf
        mask = mask.to(dtype)
        want = mask.float() * LOG2E
    bias = hopper.bias_of(mask)
    want = torch.nn.functional.pad(want, (0, 84), value=-torch.inf).view(b, h, 3, 128)
    torch.testing.assert_close(bias[..., :128], want, rtol=0, atol=0, equal_nan=True)
    # A tile of keys that gain nothing is marked as such; NaN is what the kernel multiplies by 0.
    any_of = torch.where(want.isnan().any(3), torch.nan, (want != 0).any(3).float())
    any_of = any_of.unsqueeze(3).expand(-1, -1, -1, 4)
    torch.testing.assert_close(bias[..., 128:], any_of, rtol=0, atol=0, equal_nan=True)
    assert (any_of == 0).any()
