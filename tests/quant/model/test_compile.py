"""torch.compile of quantized diffusers models: one graph per kind of block, compiled once."""

import itertools

import pytest
import torch
import torch._dynamo as dynamo

import lowbit
from lowbit.ops.attention import router
from lowbit.quant import formats
from lowbit.quant.demo.models import BATCH, TEXT_WIDTH
from tests.quant.model.conftest import BLOCKS, SMALL, only_wan

# How attention is computed is not what differs between formats.
MODES = ["auto", "lowbit_exact"]
# One of each kind of product.
QUICK = {"int8_convrot", "fp8_e4m3", "convrot_w4a4", "nvfp4"}


@pytest.fixture(autouse=True)
def strict():
    """A second compilation of the same code is an error; counters begin at none."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    with dynamo.config.patch(error_on_recompile=True):
        yield
    dynamo.reset()


def graphs() -> int:
    assert not dynamo.utils.counters["graph_break"]
    return dynamo.utils.counters["stats"]["unique_graphs"]


def prepared(model, name, mode):
    model.bfloat16()
    lowbit.quantize_model(model, name)
    lowbit.set_attention(model, mode, layers="all")
    return model


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in formats.names()],
)
def test_blocks_are_one_graph_for_all_blocks_and_steps(model, run, name):
    mode = MODES[formats.names().index(name) % 2]
    prepared(model, name, mode)
    want = [run(model, torch.bfloat16, sigma) for sigma in (0.9, 0.5)]
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    got = [run(model, torch.bfloat16, sigma) for sigma in (0.9, 0.5)]
    assert graphs() == 1
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("small", "name"),
    [
        pytest.param(small, name, marks=() if name in QUICK else pytest.mark.slow)
        for small, name in zip(itertools.cycle(SMALL), formats.names(), strict=False)
    ],
    indirect=["small"],
    ids=lambda value: getattr(value, "name", value),
)
def test_lowered_graph_computes_the_same(model, run, name):
    prepared(model, name, MODES[formats.names().index(name) % 2])
    want = run(model, torch.bfloat16)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    got = run(model, torch.bfloat16)
    assert graphs() == 1
    # Outside eager, chains of bf16 operations are rounded where the graph says.
    assert (got - want).norm() <= 4 * torch.finfo(torch.bfloat16).eps * want.norm()


@only_wan
def test_whole_model_is_one_graph(model, run):
    prepared(model, "int8_convrot", "lowbit_exact")
    want = run(model, torch.bfloat16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = run(compiled, torch.bfloat16)
    run(compiled, torch.bfloat16, 0.25)
    assert torch.equal(got, want)
    assert graphs() == 1


@only_wan
def test_our_operations_are_steps_of_the_graph(model, run):
    prepared(model, "convrot_w4a4", "lowbit_exact")
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    run(model, torch.bfloat16)
    assert any(name.startswith("lowbit.routed_attention") for name in seen)
    assert any(name.startswith("lowbit.kitchen_convrot_w4a4") for name in seen)


@only_wan
def test_other_settings_compile_anew_and_nothing_else(model, run):
    prepared(model, "int8_convrot", "lowbit_exact")
    # What is new to diffusers' list of backends would compile every block anew, once.
    lowbit.set_attention(model, router.SDPA, blocks=f"{BLOCKS - 1}").undo()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    run(model, torch.bfloat16)
    assert router.SDPA != "lowbit_exact" and graphs() == 1
    with dynamo.config.patch(error_on_recompile=False):
        lowbit.set_attention(model, router.SDPA, blocks=f"{BLOCKS - 1}")
        run(model, torch.bfloat16)
    assert graphs() == 2


@pytest.mark.parametrize("marked", [False, True], ids=["as torch does", "marked"])
def test_lengths_of_text_take_one_more_graph_at_most(small, model, marked):
    """The second length compiles a graph for all that follow; a dimension marked so, the first."""
    prepared(model, "int8_convrot", "lowbit_exact")
    compiled, seen = torch.compile(model, backend="eager", fullgraph=True), []
    latent = torch.zeros(small.latent_shape).bfloat16()
    for length in (16, 24, 32):
        text = torch.ones(BATCH, length, TEXT_WIDTH).bfloat16()
        if marked:
            dynamo.mark_dynamic(text, 1)
        with dynamo.config.patch(error_on_recompile=False), torch.inference_mode():
            small.velocity(compiled, latent, 0.5, text)
        seen.append(graphs())
    assert seen == ([1, 1, 1] if marked else [1, 2, 2])
