"""Differences of whole parameters while a model runs: norms, biases, and what lies in no layer."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from lowbit.nodes.lora_terms import Difference, Lora, Stack
from tests.nodes.test_lora_terms import DIM, Block, merge, term


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).requires_grad_(False)


@pytest.fixture
def loras() -> list[Lora]:
    """Two, each of a layer and of a parameter that is in no layer."""
    return [
        Lora(
            {"0.ffn.0": term(DIM, (DIM,), seed)},
            1.0,
            (0.0, 1.0),
            {"1.modulation": Difference(torch.full((1, DIM), 0.5))},
        )
        for seed in range(2)
    ]


class HostNorm(nn.LayerNorm):
    """As ComfyUI's: its parameters pass functions on their way, from copies under dynamic VRAM."""

    weight_function: ClassVar = []
    bias_function: ClassVar = []

    def forward(self, x):
        weight, bias = self.weight, self.bias
        for function in self.weight_function:
            weight = function(weight)
        for function in self.bias_function:
            bias = function(bias)
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias)


@pytest.fixture
def normed():
    """A norm as the host has it, one with functions of its own, and one of torch's."""
    root = nn.Sequential(HostNorm(DIM), HostNorm(DIM), nn.LayerNorm(DIM)).requires_grad_(False)
    root[1].bias_function = [lambda bias: bias + 1]
    return root


def of_norms(seed: int) -> Lora:
    """Differences of all parameters of three norms."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")]
    values = {name: Difference(torch.randn(DIM, generator=generator)) for name in names}
    return Lora({}, 1.0, (0.0, 0.5), values)


def test_norms_and_biases_follow_the_strengths_and_are_given_back(normed):
    x, stack = torch.randn(5, DIM), Stack((of_norms(0), of_norms(1)))
    plain, attributes = normed(x), {name: dict(vars(m)) for name, m in normed.named_modules()}
    for now in ((1.0, 0.0), (0.0, 0.4), (0.7, -0.2), (0.0, 0.0)):
        with torch.inference_mode(), stack.applied(normed, now):
            got = normed(x)
        assert {name: dict(vars(m)) for name, m in normed.named_modules()} == attributes
        assert torch.equal(normed(x), plain)
        want = copy.deepcopy(normed)
        for lora, strength in zip(stack.loras, now, strict=True):
            merge(want, lora, strength)
        torch.testing.assert_close(got, want(x))
    with pytest.raises(RuntimeError), stack.applied(normed, (1.0, 1.0)):
        normed(torch.randn(5, DIM + 1))
    assert {name: dict(vars(m)) for name, m in normed.named_modules()} == attributes


def test_what_the_host_keeps_of_a_parameter_never_has_the_difference(normed):
    """Dynamic VRAM holds the copy that it once took of the layer's own parameter."""
    held = dict(normed[0].named_parameters())
    with Stack((of_norms(0),)).applied(normed, (1.0,)):
        assert all(normed[0].get_parameter(n) is p for n, p in held.items())
        assert len(normed[0].weight_function) == 1 and len(normed[1].bias_function) == 2
    assert HostNorm.weight_function == [] and "weight_function" not in vars(normed[0])


def test_difference_keeps_dtype_and_is_a_parameter_that_the_host_moves():
    one, weight = Difference(torch.full((4,), 0.5)), torch.ones(4, dtype=torch.bfloat16)
    one.prepare(0.5, torch.device("cpu"))
    held = one._factor
    assert torch.equal(one(weight), torch.full((4,), 1.25).bfloat16())
    assert torch.equal(weight, torch.ones(4)) and list(one.state_dict()) == ["value.weight"]
    one.to(torch.float64).prepare(-2.0, torch.device("cpu"))
    assert one._factor is held and torch.equal(one(weight), torch.zeros(4))


def test_differences_of_norms_compile_a_graph_for_each_set_of_loras(normed):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    stack, x = Stack((of_norms(0), of_norms(1))), torch.randn(5, DIM)
    compiled = torch.compile(normed, backend="eager", fullgraph=True)
    for now in ((1.0, 0.5), (0.7, -0.2), (0.3, 0.1), (0.0, 0.5), (0.0, 0.9), (1.0, 0.5)):
        with torch.inference_mode(), stack.applied(normed, now):
            torch.testing.assert_close(compiled(x), normed(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class Kept:
    """A backend of torch.compile that keeps the inputs of its graph, call by call.

    Held, none of their memory comes back for another tensor.
    """

    def __init__(self):
        self.calls = []

    def __call__(self, graph, inputs):
        def run(*given):
            self.calls.append(given)
            return graph.forward(*given)

        return run

    def moved(self) -> int:
        """Return how many inputs do not lie in the same place in every call."""
        places = [[t.data_ptr() for t in call] for call in self.calls]
        return sum(len(set(ptrs)) > 1 for ptrs in zip(*places, strict=True))


def test_compiled_model_reads_all_from_the_same_memory_whatever_the_strength(model, loras):
    """CUDA graphs take parameters and attributes of modules for static: else they record again."""
    torch.compiler.reset()
    x, stack, kept = torch.randn(5, DIM), Stack(tuple(loras)), Kept()
    with torch.inference_mode():
        compiled = torch.compile(model, backend=kept, fullgraph=True)
        for now in ((1.0, 0.5), (1.0, 0.5), (0.7, -0.2), (0.3, 0.1)):
            with stack.applied(model, now):
                torch.testing.assert_close(compiled(x), model(x))
    assert len(kept.calls) == 4 and kept.moved() == 0


def test_values_of_a_bare_parameter_are_followed_and_given_back(model, loras):
    """ComfyUI's hooks write into parameters between two runs, without a trace on the tensor."""
    block, stack = model[1], Stack(tuple(loras))
    plain, held = block.modulation, model.state_dict()
    with torch.inference_mode():
        for base in (0.0, 3.0):
            plain.data.copy_(torch.full((1, DIM), base))
            with stack.applied(model, (1.0, -0.5)):
                torch.testing.assert_close(block.modulation, torch.full((1, DIM), base + 0.25))
            assert block.modulation is plain and (plain == base).all()
            assert all(model.state_dict()[n].data_ptr() == v.data_ptr() for n, v in held.items())


def test_copies_of_a_module_have_its_differences(model, loras):
    """As our fused blocks: another pack's patch may be bound to the block that they are made of."""
    block, other = model[1], object.__new__(Block)
    vars(other).update(vars(block))
    with Stack(tuple(loras)).applied(model, (1.0, 0.5)):
        torch.testing.assert_close(other.modulation, block.modulation)
        inside = other.modulation.clone()
    torch.testing.assert_close(inside, other.modulation + 0.75)


def test_bare_parameter_elsewhere_is_summed_where_the_model_runs(model, loras):
    """Offloaded ones stay on the CPU: a sum there would wait for the GPU's differences."""
    with Stack(tuple(loras)).applied(model, (1.0, 0.5), torch.device("meta")):
        assert model[1].modulation.device.type == "meta"
    assert model[1].modulation.device.type == "cpu"


def test_differences_of_one_parameter_are_rounded_once():
    root = Block().to(torch.bfloat16).requires_grad_(False)
    root.modulation.fill_(1.0)
    # Half a step of bfloat16 at 1 each: on its own, every one of them is rounded away.
    step = torch.finfo(torch.bfloat16).eps / 2
    one = [
        Lora({}, 1.0, (0.0, 1.0), {"modulation": Difference(torch.full((1, DIM), step))})
        for _ in range(2)
    ]
    with Stack(tuple(one)).applied(root, (1.0, 1.0)):
        assert (root.modulation.float() == 1 + 2 * step).all()


def test_layer_without_the_hosts_functions_takes_a_difference_beside_its_term(model):
    conv, x = model[0].conv, torch.randn(3, 2, 2, 4, 6)
    values = {"0.conv.weight": Difference(torch.randn(conv.weight.shape))}
    lora = Lora({"0.conv": term(8, (2, 1, 2, 2), 0)}, 1.0, (0.0, 1.0), values)
    with Stack((lora,)).applied(model, (0.5,)):
        got = model[0].conv(x)
    assert model[0].conv is conv and type(conv) is nn.Conv3d
    merge(model, lora, 0.5)
    torch.testing.assert_close(got, conv(x))


def test_strength_is_written_when_it_changes_alone(model, loras):
    stack = Stack(tuple(loras))
    of = [lora.differences["1.modulation"] for lora in loras]
    versions = []
    for now in ((1.0, 0.5), (1.0, 0.5), (1.0, 0.5), (1.0, 0.4)):
        with stack.applied(model, now):
            versions.append([one._factor._version for one in of])
    assert versions[0] == versions[1] == versions[2]
    assert versions[3][0] == versions[0][0] and versions[3][1] > versions[0][1]
