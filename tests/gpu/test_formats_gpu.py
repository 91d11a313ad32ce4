"""Every format on the GPU: the same bytes as on the CPU, and linear layers against float64."""

import pytest
import torch
import torch.nn.functional as F

from lowbit.quant import formats

ALL = formats.names()
# On a GPU division by a constant is a multiplication by its reciprocal: a value, or the scale of a
# whole block, that lies half way between two codes may go to the other one.
MAX_OTHER_CODES = 0.005


def weight(n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(n, k, generator=generator) * 0.02).bfloat16()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", ALL)
def test_gpu_gives_the_codes_of_the_cpu(name):
    fmt = formats.get(name)
    source = weight(512, 1024)
    on_cpu = fmt.quantize(source)
    on_gpu = fmt.quantize(source.cuda())
    other = on_cpu._qdata.view(torch.uint8) != on_gpu._qdata.cpu().view(torch.uint8)
    assert other.float().mean().item() <= MAX_OTHER_CODES


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens", [1, 17, 512, 4097])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_is_near_float64(name, tokens, with_bias, dtype):
    fmt = formats.get(name)
    source = weight(768, 1024).to(dtype).cuda()
    x = torch.randn(tokens, 1024, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    bias = torch.randn(768, dtype=dtype, device="cuda") if with_bias else None
    before = x.clone()
    with torch.inference_mode():
        got = F.linear(x, fmt.quantize(source), bias)
    want = F.linear(x.double(), source.double(), None if bias is None else bias.double())
    # The activation is rounded at most as coarsely as the weight, independently of it; a tenth of
    # a percent is the rounding of the result.
    assert error(got, want) < 2**0.5 * fmt.max_error + 0.001
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ALL)
def test_tokens_of_very_different_norm_keep_their_precision(name):
    fmt = formats.get(name)
    source = weight(768, 1024).cuda()
    x = torch.randn(256, 1024, device="cuda").bfloat16()
    x[::2] *= 1e-3
    with torch.inference_mode():
        got = F.linear(x, fmt.quantize(source))
    want = F.linear(x.double(), source.double())
    assert torch.isfinite(got).all()
    if fmt.name not in ("fp8_e4m3", "fp8_e5m2"):
        # Per-tensor FP8 has one scale for all tokens: small ones fall into its subnormals.
        assert error(got[::2], want[::2]) < 2**0.5 * fmt.max_error + 0.001
