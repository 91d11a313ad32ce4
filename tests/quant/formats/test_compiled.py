"""Weights in compiled graphs whose number of tokens torch knows by a symbol."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

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
