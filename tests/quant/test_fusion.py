"""Feed-forwards and shared inputs, on modules like the host's, without the host."""

import re

import pytest
import torch
from torch import nn

from lowbit.ops.linear import sharing
from lowbit.quant import families, fusion
from lowbit.quant.families.base import Family, FeedForward

FAMILY = Family(
    name="small",
    title="Small",
    recognise=lambda shapes: None,
    quantized=re.compile("."),
    stack=re.compile("blocks."),
    shared_inputs=(("attn.q", "attn.k", "attn.v"),),
    feed_forwards=(FeedForward("ffn", "0", "2"),),
)
GELU = nn.GELU(approximate="tanh")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkvo"})
        self.ffn = nn.Sequential(nn.Linear(8, 16), GELU, nn.Linear(16, 8))


def run(layer, x):
    return layer(GELU(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})


def layers(model) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_feed_forwards_of_the_family_are_found(model):
    found = [name for name, _ in fusion.feed_forwards(layers(model), FAMILY)]
    assert found == ["blocks.0.ffn", "blocks.1.ffn"]
    some = {n: m for n, m in layers(model).items() if n == "blocks.1.ffn.0"}
    assert not list(fusion.feed_forwards(some, FAMILY))


def test_fused_feed_forward_computes_the_same_and_has_the_same_children(model):
    plain = model["blocks"][0].ffn
    ((_, record), *_) = fusion.feed_forwards(layers(model), FAMILY)
    fused = fusion.fused(plain, record, run)
    x = torch.randn(3, 8)
    assert torch.equal(fused(x), plain(x))
    assert isinstance(fused, nn.Sequential)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert type(plain) is nn.Sequential
    assert fusion.fused(fused, record, run) is fused


def test_layer_that_is_replaced_in_one_is_replaced_in_both(model):
    """The host patches children by name, in any order, and takes its patches back."""
    plain = model["blocks"][0].ffn
    fused = fusion.fused(plain, FAMILY.feed_forwards[0], run)
    other = nn.Linear(16, 8)
    plain[2] = other
    assert fused[2] is other
    x = torch.randn(3, 8)
    assert torch.equal(fused(x), plain(x))


def test_layers_announce_the_input_that_they_share(model):
    ours = {n: m for n, m in layers(model).items() if n != "blocks.1.attn.k"}
    fusion.share_inputs(ours, FAMILY)
    for block, readers in ((0, 3), (1, 2)):
        x = torch.randn(3, 8)
        attention = model["blocks"][block].attn
        attention["q"](input=x)
        assert getattr(x, sharing.ATTRIBUTE).readers == readers - 1
        for part in "kv"[-(readers - 1) :]:
            attention[part](x)
        assert not hasattr(x, sharing.ATTRIBUTE)
        y = torch.randn(3, 8)
        model["blocks"][block].attn["o"](y)
        assert not hasattr(y, sharing.ATTRIBUTE)
    x = torch.randn(3, 8)
    model["blocks"][1].attn["k"](x)
    assert not hasattr(x, sharing.ATTRIBUTE)


@pytest.mark.parametrize("name", families.names())
def test_layers_that_share_are_layers_that_are_quantized(name):
    """A name with a slip would share nothing, silently."""
    family = families.get(name)
    parts = [part for group in family.shared_inputs for part in group]
    parts += [f"{f.name}.{part}" for f in family.feed_forwards for part in (f.first, f.second)]
    for part in parts:
        places = (f"blocks.0.{part}", f"transformer_blocks.0.{part}")
        assert any(family.quantized.fullmatch(place) for place in places), part


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()])
def test_feed_forward_with_another_activation_stays_as_it_is(model, activation):
    plain = model["blocks"][0].ffn
    plain[1] = activation
    assert fusion.fused(plain, FAMILY.feed_forwards[0], run) is plain
