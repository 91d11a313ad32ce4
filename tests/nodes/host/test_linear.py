"""What the host says of weights that cannot be multiplied as they were wished to be."""

import pytest
import torch

from lowbit.nodes.host.linear import naming
from lowbit.ops.linear import eight_bits as module
from lowbit.ops.linear import with_arithmetic
from lowbit.quant import formats


def test_corrupt_weight_is_named_with_its_layer(monkeypatch):
    monkeypatch.setattr(module, "has_fp8", lambda device: True)
    weight = formats.get("nvfp4").quantize(torch.ones(4, 64))
    weight._params.block_scale.view(torch.uint8).reshape(-1)[0] = 0x7F
    said = pytest.raises(ValueError, match=r"^layer blocks.3.ffn.0: the weight holds NaN")
    with said, naming("blocks.3.ffn.0"):
        with_arithmetic(weight, "w4a8_exact")
