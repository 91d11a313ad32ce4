"""How much Python a quantized linear layer runs: on small inputs it takes longer than the GPU.

Counted are calls of Python functions, Triton's launcher aside, which do not depend on the machine.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton, whose kernels are launched here, is missing")

from lowbit.ops import launch, registry
from lowbit.ops.linear import LowRank, linear
from lowbit.ops.quantize_rows import triton as quantizer
from lowbit.ops.scaled_mm import triton as product
from lowbit.quant import formats

N, K, M, RANK = 64, 256, 48, 16
HOPPER = (9, 0)
# With torch 2.13 these were 99 and 163, before calls were prepared once 173 and 285: there is room
# for other versions, not for work that is done anew for each call.
LINEAR_CALLS, LOW_RANK_CALLS = 140, 210


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Have Triton's backends chosen as on a Hopper GPU, and launch nothing."""

    def select(op, call, name="auto"):
        fits = (b for b in registry.backends(op) if call.scheme in b.needs.schemes)
        return next(b for b in fits if b.name == "triton")

    monkeypatch.setattr(registry, "select", select)
    monkeypatch.setattr(launch, "launch", lambda kernel, *rest: kernel)
    monkeypatch.setattr(launch, "again", lambda *arguments: None)
    monkeypatch.setattr(product, "processors_of", lambda device: 132)
    for module in (quantizer, product):
        monkeypatch.setattr(module, "capability", lambda device: HOPPER)


def calls_of(function) -> int:
    """Return how many Python functions a call of `function` calls when nothing of it is new."""
    for _ in range(3):
        function()
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    previous = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(previous)
    return count


@pytest.mark.parametrize("name", ["int8_convrot", "fp8_e4m3"])
@torch.inference_mode()
def test_linear_layer_calls_few_functions(name):
    weight = formats.get(name).quantize(torch.randn(N, K).bfloat16())
    x, bias = torch.randn(1, M, K).bfloat16(), torch.randn(N).bfloat16()
    assert calls_of(lambda: F.linear(x, weight, bias)) <= LINEAR_CALLS


@torch.inference_mode()
def test_low_rank_term_calls_few_functions():
    quantize = formats.get("int8_convrot").quantize
    weight, down = (quantize(torch.randn(rows, K).bfloat16()) for rows in (N, RANK))
    term = LowRank(down, torch.randn(N, RANK).bfloat16(), None)
    x = torch.randn(1, M, K).bfloat16()
    assert calls_of(lambda: linear(x, weight, low_rank=term)) <= LOW_RANK_CALLS
