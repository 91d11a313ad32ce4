"""Weights in compiled graphs whose number of tokens torch knows by a symbol."""

import operator

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from lowbit.ops import linear
from lowbit.ops.scaled_mm.hopper import HOPPER
from lowbit.quant import formats

# Below and above where 4-bit weights change their arithmetic.
FEW, MANY = (1, 9, 33, 64), (65, 128, 300)


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad"])
def test_number_of_tokens_may_change(fmt, quantized, mode):
    weight = quantized(fmt, (160, 512)).to(torch.bfloat16)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: F.linear(x, weight), backend=counter, dynamic=True)
    with getattr(torch, mode)():
        for tokens in (*FEW, *MANY):
            x = torch.randn(1, tokens, 512, dtype=torch.bfloat16)
            assert torch.equal(compiled(x), F.linear(x, weight))
    # One for few and one for many, and torch's own for a single token.
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", ["int8_convrot", "nvfp4"])
def test_kernels_for_few_and_for_many_are_told_apart_by_a_product_of_symbols(
    quantized, monkeypatch, name
):
    """As in Qwen-Image's blocks, which ask with batch times length."""
    weight = quantized(formats.get(name), (160, 512))
    monkeypatch.setattr(linear.registry, "capability", lambda device: HOPPER)
    # What kernels' needs are compared with.
    monkeypatch.setattr(
        linear.registry, "select", lambda op, call, name: operator.ne(call.few, False)
    )

    def told(x):
        rows = x.shape[0] * x.shape[1]
        return x + 1 if linear._chosen(weight, x.device, rows, "auto") else x - 1

    torch._dynamo.reset()
    compiled = torch.compile(told, backend="eager", fullgraph=True, dynamic=True)
    for size, sign in (((2, 9, 512), 1), ((3, 5000, 512), -1)):
        assert torch.equal(compiled(torch.zeros(size)), torch.full(size, float(sign)))
