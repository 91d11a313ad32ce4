"""Layers with LoRAs while a model runs: what they add, what is left behind, without ComfyUI."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lowbit.nodes import lora_terms
from lowbit.nodes.lora_loader import LowBitLoraLoader
from lowbit.nodes.lora_terms import Difference, Lora, Matrix, Stack, Term, WithTerms, padded
from lowbit.quant import formats

DIM, RANK, WIDE = 32, 4, 256
STEP = torch.ops.lowbit.linear_with_terms.default
INPUTS = {
    "model": "MODEL",
    "lora_name": [],
    "strength": "FLOAT",
    "start_percent": "FLOAT",
    "end_percent": "FLOAT",
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.conv = nn.Conv3d(2, 8, (1, 2, 2), (1, 2, 2))
        self.modulation = nn.Parameter(torch.zeros(1, DIM))

    def forward(self, x):
        return self.ffn(x) + self.modulation


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).requires_grad_(False)


def term(n: int, inputs: tuple[int, ...], seed: int) -> Term:
    """A LoRA of rank RANK, scale 0.5 and a bias of ones, padded as they are stored."""
    size = padded(RANK + 1)
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.zeros(size, *inputs), torch.zeros(n, size)
    down[:RANK] = torch.randn(RANK, *inputs, generator=generator)
    up[:, :RANK] = torch.randn(n, RANK, generator=generator)
    up[:, RANK] = 1
    scales, constants = torch.zeros(2, size)
    scales[:RANK], constants[RANK] = 0.5, 1
    return Term(Matrix(down), Matrix(up), scales, constants)


def merge(model: nn.Module, lora: Lora, strength: float) -> None:
    for name, one in lora.terms.items():
        layer = model.get_submodule(name)
        low = one.up.weight[:, :RANK] @ one.down.weight[:RANK].flatten(1)
        layer.weight += strength * 0.5 * low.reshape(layer.weight.shape)
        layer.bias += strength
    for name, value in lora.differences.items():
        model.get_parameter(name).add_(strength * value.value.weight)


@pytest.fixture
def loras() -> list[Lora]:
    names = ("0.ffn.0", "0.ffn.2", "1.ffn.2")
    return [
        Lora(
            {name: term(DIM, (DIM,), seed + i) for i, name in enumerate(names[: 3 - seed // 10])},
            1.0,
            (0.0, 1.0),
            {"1.modulation": Difference(torch.full((1, DIM), 0.5))},
        )
        for seed in (0, 10)
    ]


def test_result_is_that_of_merged_weights(model, loras):
    x = torch.randn(5, DIM)
    with Stack(tuple(loras)).applied(model, (0.7, -0.2)):
        got = model(x)
    merge(model, loras[0], 0.7)
    merge(model, loras[1], -0.2)
    # Sums in another order, of values of about 20.
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-4)


def test_convolution_takes_it(model):
    conv, x = model[0].conv, torch.randn(3, 2, 2, 4, 6)
    lora = Lora({"0.conv": term(8, (2, 1, 2, 2), 0)}, 1.0, (0.0, 1.0))
    with Stack((lora,)).applied(model, (0.5,)):
        got = model[0].conv(x)
    assert model[0].conv is conv
    merge(model, lora, 0.5)
    torch.testing.assert_close(got, conv(x))


def test_nothing_is_left_behind_not_even_after_an_error(model, loras):
    before = dict(model.named_modules()), dict(model.named_parameters())
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    classes = [type(m) for m in model.modules()]
    x, stack = torch.randn(5, DIM), Stack(tuple(loras))
    plain = model(x)
    with pytest.raises(RuntimeError), stack.applied(model, (1.0, 1.0)):
        assert isinstance(model[0].ffn[0], WithTerms)
        model(torch.randn(5, DIM + 1))
    after = dict(model.named_modules()), dict(model.named_parameters())
    assert all(
        x is y
        for b, a in zip(before, after, strict=True)
        for x, y in zip(b.values(), a.values(), strict=True)
    )
    assert attributes == {name: dict(vars(m)) for name, m in model.named_modules()}
    assert classes == [type(m) for m in model.modules()]
    assert torch.equal(model(x), plain)


def test_strength_0_replaces_nothing(model, loras):
    with Stack(tuple(loras)).applied(model, (0.0, 0.0)):
        assert not any(isinstance(m, WithTerms) for m in model.modules())
    with Stack(tuple(loras)).applied(model, (0.0, 1.0)):
        assert isinstance(model[0].ffn[0], WithTerms) and not isinstance(model[1].ffn[2], WithTerms)


def test_views_share_all_that_is_noted_on_a_layer(model, loras):
    plain = model[0].ffn[0]
    with Stack(tuple(loras)).applied(model, (1.0, 0.0)):
        view = model[0].ffn[0]
        assert view is not plain and isinstance(view, nn.Linear)
        view.noted = 1
        view.weight = nn.Parameter(plain.weight.double(), requires_grad=False)
        assert view.state_dict().keys() == {"weight", "bias"}
    assert plain.noted == 1 and plain.weight.dtype == torch.float64


def test_hooks_and_a_forward_of_another_packs_are_kept(model, loras):
    """ComfyUI's bypass LoRAs assign to a layer's forward."""
    layer, x, seen = model[0].ffn[0], torch.randn(5, DIM), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 3
    lora = Lora({"0.ffn.0": loras[0].terms["0.ffn.0"]}, 1.0, (0.0, 1.0))
    base = layer(x)
    with Stack((lora,)).applied(model, (1.0,)):
        got = model[0].ffn[0](x)
    assert seen == [1, 1]
    merge(model, lora, 1.0)
    torch.testing.assert_close(got, plain(x) + 3)
    assert not torch.equal(got, base)


def test_compiled_model_follows_what_acts(model, loras):
    x, stack = torch.randn(5, DIM), Stack(tuple(loras))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for now in ((0.0, 0.0), (1.0, 0.5), (0.0, 0.0), (0.3, 0.0), (1.0, 0.5)):
        with stack.applied(model, now):
            torch.testing.assert_close(compiled(x), model(x))


def quantized_term(n: int, k: int, seed: int) -> Term:
    """The same LoRA with its first matrix in INT8, as it stands beside an INT8 layer."""
    one = term(n, (k,), seed)
    down = Matrix(formats.get("int8").quantize(one.down.weight))
    return Term(down, one.up, one.scales, one.constants)


def term_in_fp8(n: int, k: int, seed: int) -> Term:
    """The same LoRA with its first matrix in FP8, as it stands beside a layer in FP8."""
    one = term(n, (k,), seed)
    down = Matrix(formats.get("fp8_e4m3_rowwise").quantize(one.down.weight))
    return Term(down, one.up, one.scales, one.constants)


MAKERS = [lambda n, k, s: term(n, (k,), s), quantized_term, term_in_fp8]


@pytest.mark.parametrize("make", MAKERS)
def test_schedule_of_strengths_compiles_a_graph_for_each_set_of_loras(model, make):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    difference = {"1.modulation": Difference(torch.full((1, DIM), 0.5))}
    both = [
        Lora({name: make(DIM, DIM, seed) for name in names}, 1.0, (0.0, 1.0), difference)
        for seed, names in enumerate((("0.ffn.0", "1.ffn.2"), ("0.ffn.0",)))
    ]
    stack, x = Stack(tuple(both)), torch.randn(5, DIM)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    results = []
    for now in ((1.0, 0.5), (1.0, 0.5), (0.7, -0.2), (0.3, 0.1), (0.2, 0.0), (0.9, 0.0)):
        with torch.inference_mode(), stack.applied(model, now):
            got, want = compiled(x), model(x)
        # Joined terms and terms one after the other round alike but for the last bits.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
        results.append(want)
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(results[1:]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("make", MAKERS)
def test_strength_is_written_in_place_and_follows_a_matrix_that_was_moved(model, make):
    one, x = make(DIM, DIM, 0), torch.randn(5, DIM)
    stack = Stack((Lora({"0.ffn.0": one}, 1.0, (0.0, 1.0)),))
    layer, outs = model[0].ffn[0], {}
    plain = layer(x)
    with torch.inference_mode(), stack.applied(model, (1.0,)):
        outs[1.0] = model[0].ffn[0](x)
    held = one._factor
    with stack.applied(model, (0.5,)):
        outs[0.5] = model[0].ffn[0](x)
    assert one._factor is held
    torch.testing.assert_close((outs[1.0] - plain) / 2, outs[0.5] - plain, rtol=1e-4, atol=1e-4)
    one._apply(lambda t: t.clone())
    assert one.down.scaled is None
    with stack.applied(model, (0.5,)):
        torch.testing.assert_close(model[0].ffn[0](x), outs[0.5])


@pytest.mark.parametrize("make", MAKERS)
def test_copy_of_a_lora_has_memory_of_its_own_and_shares_what_the_first_shares(model, make):
    """For a model on another GPU: the host moves its matrices, another thread its strengths."""
    one = make(DIM, DIM, 0)
    one.key, one.rows = object(), (0, one.scales.numel())
    other = Term(one.down, Matrix(one.up.weight), one.scales, one.constants, one.rows, one.key)
    difference = {"1.modulation": Difference(torch.full((1, DIM), 0.5))}
    first = Lora({"0.ffn.0": one, "1.ffn.0": other}, 1.0, (0.0, 0.5), difference)
    one.down.noted_by_the_host, x = 1, torch.randn(5, DIM)
    with torch.inference_mode(), Stack((first,)).applied(model, (0.5,)):
        want = model(x)
    second = copy.deepcopy(first)
    down, again = (second.terms[name].down for name in ("0.ffn.0", "1.ffn.0"))
    assert down is again and down is not one.down and not hasattr(down, "noted_by_the_host")
    assert len({term.key for term in (one, *second.terms.values())}) == 2
    assert (second.strength, second.steps) == (first.strength, first.steps)
    stored = ([getattr(p, "_qdata", p) for p in each.parameters()] for each in (first, second))
    places = ({t.data_ptr() for t in tensors} for tensors in stored)
    assert set.isdisjoint(*places)
    with torch.inference_mode():
        with Stack((second,)).applied(model, (0.5,)):
            assert torch.equal(model(x), want)
        held = one._factor.clone()
        with Stack((second,)).applied(model, (-1.0,)):
            assert not torch.equal(model(x), want) and torch.equal(one._factor, held)


@pytest.mark.parametrize("inner", [False, True], ids=["root", "block"])
def test_what_lies_at_the_top_of_a_compiled_module_is_reached_and_restored(model, inner):
    """TorchCompileModel before the LoRA: the wrapper would take a view that it never calls."""
    names = ("0.ffn.0", "0.modulation") if inner else ("ffn.0", "modulation")
    root = model if inner else model[0]
    terms, differences = (
        {names[0]: term(DIM, (DIM,), 0)},
        {names[1]: Difference(torch.full((1, DIM), 0.5))},
    )
    stack, x = Stack((Lora(terms, 1.0, (0.0, 1.0), differences),)), torch.randn(5, DIM)
    plain = root(x)
    with stack.applied(root, (1.0,)):
        want = root(x)
    compiled = torch.compile(model[0], backend="eager")
    held = compiled._modules.copy(), compiled._parameters.copy()
    if inner:
        model[0] = compiled
    with stack.applied(model if inner else compiled, (1.0,)):
        torch.testing.assert_close((model if inner else compiled)(x), want)
    assert not torch.allclose(want, plain)
    assert (compiled._modules, compiled._parameters) == held
    torch.testing.assert_close((model if inner else compiled)(x), plain)


def test_top_layer_of_a_compiled_model_has_its_term():
    root, x = nn.Sequential(nn.Linear(DIM, DIM)).requires_grad_(False), torch.randn(5, DIM)
    stack = Stack((Lora({"0": term(DIM, (DIM,), 0)}, 1.0, (0.0, 1.0)),))
    with stack.applied(root, (1.0,)):
        want = root(x)
    compiled = torch.compile(root, backend="eager")
    with stack.applied(compiled, (1.0,)):
        torch.testing.assert_close(compiled(x), want)
    assert list(compiled._modules) == ["_orig_mod"]


def test_inputs_are_those_that_workflows_hold():
    required = LowBitLoraLoader.INPUT_TYPES()["required"]
    assert {name: kind for name, (kind, _) in required.items()} == INPUTS
    assert list(required) == list(INPUTS)


class HostLinear(nn.Module):
    """As ComfyUI's: what it multiplies goes through a method of its own."""

    def __init__(self, weight, smoothing=None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.pre_quant_scale = smoothing

    def _forward(self, input, weight, bias):
        return nn.functional.linear(input, weight, bias)

    def forward(self, input):
        if self.pre_quant_scale is not None:
            input = input * self.pre_quant_scale
        return self._forward(input, self.weight, None)


@pytest.mark.parametrize("smoothing", [None, torch.full((256,), 2.0)])
def test_quantized_layer_adds_terms_in_its_product_unless_its_input_is_changed(
    smoothing, monkeypatch
):
    after = []
    add = lora_terms.add_low_rank
    monkeypatch.setattr(lora_terms, "add_low_rank", lambda *a: after.append(1) or add(*a))
    generator = torch.Generator().manual_seed(0)
    weight = formats.get("int8_convrot").quantize(torch.randn(48, 256, generator=generator) / 16)
    root = nn.ModuleDict({"layer": HostLinear(weight, smoothing)})
    one = term(48, (256,), 3)
    x = torch.randn(2, 5, 256, generator=generator)
    before = root["layer"](x)
    with Stack((Lora({"layer": one}, 1.0, (0.0, 1.0)),)).applied(root, (0.5,)):
        got = root["layer"](input=x)
    assert len(after) == (smoothing is not None)
    low = one.up.weight[:, :RANK] @ one.down.weight[:RANK]
    torch.testing.assert_close(got, before + 0.25 * x @ low.t() + 0.5, rtol=1e-4, atol=1e-3)
    assert root["layer"].weight is not None and torch.equal(root["layer"](x), before)
    assert root["layer"].weight._qdata.data_ptr() == weight._qdata.data_ptr()


class QuantizedBlock(nn.Module):
    """As blocks of a model: layers that read one tensor, and one that reads theirs."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(3, WIDE, WIDE, generator=generator).bfloat16() / 16
        made = [HostLinear(formats.get("int8_convrot").quantize(w)) for w in weights]
        self.q, self.k, self.o = made

    def forward(self, x):
        return x + self.o(torch.tanh(self.q(x)) * self.k(x))


def test_quantized_blocks_with_stacked_loras_are_one_graph_for_all_strengths():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    blocks = nn.ModuleList([QuantizedBlock(i) for i in range(3)]).requires_grad_(False)
    loras = []
    for seed in (1, 2):
        terms = {}
        for i, name in enumerate(f"{block}.{leaf}" for block in range(3) for leaf in "qko"):
            one = term(WIDE, (WIDE,), 10 * seed + i)
            down = formats.get("int8_convrot").quantize(one.down.weight.bfloat16() / 16)
            up = Matrix(one.up.weight.bfloat16() / 16)
            terms[name] = Term(Matrix(down), up, one.scales, one.constants)
        loras.append(Lora(terms, 1.0, (0.0, 1.0)))
    stack, steps = Stack(tuple(loras)), []

    def backend(graph, inputs):
        steps.append(sum(n.target == STEP for n in graph.graph.nodes))
        return graph.forward

    def run(modules, x):
        for module in modules:
            x = module(x)
        return x

    compiled = [torch.compile(b, backend=backend, fullgraph=True) for b in blocks]
    results = []
    with torch.inference_mode():
        x = torch.randn(2, 5, WIDE).bfloat16()
        for now in ((1.0, 0.5), (0.3, -0.2), (0.1, 0.1)):
            with stack.applied(blocks, now):
                results.append(run(compiled, x))
                assert torch.equal(results[-1], run(blocks, x))
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(results))
    assert steps == [3]
    assert not torch._dynamo.utils.counters["graph_break"]
