"""A product and its low-rank terms as one step of a compiled graph: what it computes, and how."""

import dataclasses

import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.backends.common import aot_autograd

from lowbit.ops.linear import LowRank, linear_with_terms, quantize_activation
from lowbit.ops.linear import terms as terms_op
from lowbit.quant import formats
from tests.ops.linear import test_low_rank
from tests.ops.linear.test_low_rank import K, N, R, beside_fp8, make, term

STEP = "lowbit.linear_with_terms.default"
layer, given = test_low_rank.layer, test_low_rank.given


@pytest.fixture
def graphs():
    """Return a backend, and the names of the operations of its graphs: above and as lowered."""
    dynamo.reset()
    above, lowered = [], []

    def names(graph):
        return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

    def compiler(graph, inputs):
        lowered.append(names(graph))
        return graph.forward

    def backend(graph, inputs):
        above.append(names(graph))
        return aot_autograd(fw_compiler=compiler)(graph, inputs)

    return backend, above, lowered


def in_8_bits(name: str, seed: int, key: object = None) -> LowRank:
    """A term whose first matrix, with the factor in its scales, is as `nodes.lora_terms` has it."""
    down = make(2 * R, K, seed=seed, scale=K**-0.5)
    rows = (0, R) if seed % 2 else (R, 2 * R)
    up = make(N, R, seed=seed + 1, scale=R**-0.5)
    return LowRank(formats.get(name).quantize(down), up, None, torch.zeros(2 * R), rows, key)


@pytest.mark.parametrize("name", ["int8_convrot", "fp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("count", [1, 2])
def test_it_is_one_step_that_computes_what_happens_without_the_compiler(layer, graphs, name, count):
    x, weight, bias, *_ = layer
    backend, above, _ = graphs
    packed = formats.get(name).quantize(weight)
    of_down = {"fp8_e4m3": "fp8_e4m3_rowwise", "nvfp4": "int8"}.get(name, name)
    terms = [in_8_bits(of_down, seed) for seed in (10, 21)[:count]]
    gate, residual = make(1, N, seed=5), make(len(x), N, seed=6)

    def run(x):
        options = {"input_act": "gelu_tanh", "gate": gate, "residual": residual}
        return linear_with_terms(x, packed, bias, terms, **options)

    with torch.inference_mode():
        got = torch.compile(run, fullgraph=True, backend=backend)(x)
        assert torch.equal(got, run(x))
    assert above == [[STEP]]


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_term_is_the_one_that_came(layer, graphs, monkeypatch, whole):
    """One LoRA has all rows of its own: what the product may make within itself."""
    x, weight, bias, *_ = layer
    backend, _, _ = graphs
    packed, term = formats.get("int8_convrot").quantize(weight), in_8_bits("int8_convrot", 10)
    if whole:
        term = dataclasses.replace(term, up=make(N, 2 * R, seed=3), rows=None)
    seen, real = [], terms_op.stacked
    monkeypatch.setattr(
        terms_op, "stacked", lambda terms: seen.append(terms[0].rows) or real(terms)
    )
    with torch.inference_mode():
        run = torch.compile(
            lambda x: linear_with_terms(x, packed, bias, [term]), fullgraph=True, backend=backend
        )
        run(x)
    # While it is compiled, and when it runs.
    assert set(seen) == {term.rows}


@pytest.mark.parametrize("name", ["int8_convrot", "fp8_e4m3_rowwise"])
def test_layers_of_one_quantized_input_project_it_once(layer, graphs, name, monkeypatch):
    x, weight, bias, *_ = layer
    backend, above, _ = graphs
    fmt, calls, key = formats.get(name), [], object()
    packed = [fmt.quantize(weight * scale) for scale in (1, 2)]
    one = in_8_bits(name, 10, key)
    terms = [one, LowRank(one.down, one.up * 2, None, one.shift, (0, R), key)]
    product = LowRank._product
    monkeypatch.setattr(LowRank, "_product", lambda self, x: calls.append(1) or product(self, x))

    def run(x):
        rounded = quantize_activation(x, packed[0])
        pairs = zip(packed, terms, strict=True)
        return tuple(linear_with_terms(rounded, w, bias, [t]) for w, t in pairs)

    with torch.inference_mode():
        want = run(x)
        assert len(calls) == 1
        # Its graph calls ours as they are, and goes through them for shapes once.
        as_is = torch.compile(run, fullgraph=True, backend="eager")
        as_is(x), calls.clear(), as_is(x)
        assert len(calls) == 1
        got = torch.compile(run, fullgraph=True, backend=backend)(x)
    assert above[0].count(STEP) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_another_strength_and_other_values_are_projected_anew(layer, graphs, compiled):
    """Both may be written into the same tensors: inputs of a graph are."""
    x, weight, bias, *_ = layer
    packed = formats.get("int8_convrot").quantize(weight)
    terms = [in_8_bits("int8_convrot", 10, object())]
    given = quantize_activation(x, packed)

    def run(given):
        return linear_with_terms(given, packed, bias, terms)

    step = torch.compile(run, fullgraph=True, backend="eager") if compiled else run
    seen = [step(given)]
    with torch.no_grad():
        for change in (
            lambda: terms[0].down._params.scale.mul_(2),
            lambda: terms[0].shift.add_(1),
            lambda: given.stored.neg_(),
            lambda: given.scale.mul_(3),
        ):
            change()
            copy = dataclasses.replace(given, stored=given.stored.clone(), made={})
            seen.append(step(given))
            assert torch.equal(seen[-1], run(copy)) and not torch.equal(*seen[-2:])


@pytest.mark.parametrize("key", [None, object()], ids=["its own", "shared"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("early", [False, True], ids=["floats", "quantized"])
def test_one_token_without_a_dimension_of_tokens_is_taken(layer, graphs, key, compiled, early):
    x, weight, bias, down, up = layer
    packed = formats.get("int8_convrot").quantize(weight)
    terms = [in_8_bits("int8_convrot", 10, key), term(down, up)]

    def run(x, residual):
        given = quantize_activation(x, packed) if early else x
        return linear_with_terms(given, packed, bias, terms, residual=residual)

    step = torch.compile(run, fullgraph=True, backend="eager") if compiled else run
    residual = make(1, N, seed=7)
    with torch.inference_mode():
        got = step(x[0], residual[0])
        assert torch.equal(got, run(x[:1], residual)[0]) and got.shape == (N,)


def test_no_terms_are_refused(layer):
    x, weight, *_ = layer
    with pytest.raises(ValueError, match="no terms"):
        linear_with_terms(x, formats.get("int8").quantize(weight), None, [])


@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "quantized before"])
def test_term_is_given_to_the_product_in_a_graph_too(layer, graphs, given, quantized):
    x, weight, bias, down, up = layer
    backend, _, lowered = graphs
    packed = formats.get("fp8_e4m3").quantize(weight)
    terms = [beside_fp8(down, up, strength) for strength in (0.7, 1e6)]

    def run(x):
        rounded = quantize_activation(x, packed) if quantized else x
        return tuple(linear_with_terms(rounded, packed, bias, [one]) for one in terms)

    with torch.inference_mode():
        want = run(x)
        assert given == [R, R]
        got = torch.compile(run, fullgraph=True, backend=backend)(x)
    # The first matrix, and the layer with the term: each is a product.
    assert lowered[0].count("lowbit.scaled_mm.default") == 4
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
