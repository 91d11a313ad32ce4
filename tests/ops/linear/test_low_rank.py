"""The low-rank term of linear layers, in every format: against float64, and against merging."""

import dataclasses

import pytest
import torch

from lowbit.ops import linear as package
from lowbit.ops import registry
from lowbit.ops.linear import (
    LowRank,
    add_low_rank,
    linear,
    quantize_activation,
    release,
    share,
    stacked,
)
from lowbit.ops.linear import activation as activations
from lowbit.ops.linear import triton as backend
from lowbit.ops.scaled_mm import scaled_mm
from lowbit.ops.scaled_mm.check import Down
from lowbit.quant import formats

N, K, R, M = 96, 512, 16, 40
STRENGTH = 0.7
BY_ROW = {"fp8_e4m3": "fp8_e4m3_rowwise", "fp8_e5m2": "fp8_e4m3_rowwise"}
IN_8_BITS = ("fp8_e4m3", "fp8_e4m3_rowwise", "fp8_e5m2", "int8", "int8_convrot")
BF16 = torch.finfo(torch.bfloat16).eps


def make(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.fixture
def layer():
    """x, weight, bias, down and up; the term is about as large as the layer's own result."""
    return (
        make(M, K, seed=0),
        make(N, K, seed=1, scale=K**-0.5),
        make(N, seed=2),
        make(R, K, seed=3, scale=K**-0.5),
        make(N, R, seed=4, scale=R**-0.5),
    )


def term(down, up, strength: float = STRENGTH, **given) -> LowRank:
    return LowRank(down, up, torch.full((down.shape[0],), strength), **given)


def wanted(x, weight, bias, down, up) -> torch.Tensor:
    merged = weight.double() + STRENGTH * up.double() @ down.double()
    return x.double() @ merged.t() + bias.double()


@pytest.mark.parametrize("name", formats.names())
def test_error_is_that_of_the_format(layer, name):
    x, weight, bias, down, up = layer
    quantized = formats.get(name).quantize(weight)
    want = wanted(*layer)
    got = linear(x, quantized, bias, low_rank=term(down, up))
    added = STRENGTH * x.double() @ down.double().t() @ up.double().t()
    without = linear(x, quantized, bias).double() + added
    assert error(got, want) <= error(without, want) + 4 * BF16


@pytest.mark.parametrize("name", IN_8_BITS)
def test_first_matrix_in_8_bits_errs_no_more_than_the_format(layer, name):
    x, weight, bias, down, up = layer
    fmt, beside = formats.get(name), formats.get(BY_ROW.get(name, name))
    quantized, small = fmt.quantize(weight), beside.quantize(down)
    got = linear(x, quantized, bias, low_rank=term(small, up))
    # A weight and a matrix beside it, each rounded, and x for both.
    assert error(got, wanted(*layer)) <= 2 * fmt.max_error
    rows = quantize_activation(x, quantized)
    shared = linear(rows, quantized, bias, low_rank=term(small, up))
    assert error(shared, wanted(*layer)) <= 2 * fmt.max_error


@pytest.mark.parametrize("name", ["int8_convrot", "nvfp4"])
def test_no_weight_is_copied_or_written_to(layer, name):
    x, weight, bias, down, up = layer
    quantized = formats.get(name).quantize(weight)
    small = formats.get("int8_convrot").quantize(down) if name != "nvfp4" else down
    before, place = quantized._qdata.clone(), quantized._qdata.data_ptr()
    given = x.clone()
    for _ in range(2):
        linear(x, quantized, bias, low_rank=term(small, up))
    assert quantized._qdata.data_ptr() == place and torch.equal(quantized._qdata, before)
    assert torch.equal(x, given)


def test_shift_and_a_row_of_zeros_are_a_bias(layer):
    x, weight, bias, down, up = layer
    quantized = formats.get("int8_convrot").quantize(weight)
    extra = make(N, seed=9)
    wide_down = torch.cat([down, torch.zeros(1, K).bfloat16()])
    wide_up = torch.cat([up, extra[:, None]], dim=1)
    factor = torch.full((R + 1,), STRENGTH)
    shift = torch.zeros(R + 1)
    shift[R] = STRENGTH
    got = linear(x, quantized, bias, low_rank=LowRank(wide_down, wide_up, factor, shift))
    want = linear(x, quantized, bias, low_rank=term(down, up)).double() + STRENGTH * extra.double()
    assert error(got, want) <= 4 * BF16


@pytest.mark.parametrize("in_8_bits", [True, False])
def test_stacked_terms_are_their_sum(layer, in_8_bits):
    x, weight, bias, down, up = layer
    quantized = formats.get("int8_convrot").quantize(weight)
    other = make(2 * R, K, seed=7, scale=K**-0.5), make(N, 2 * R, seed=8, scale=R**-0.5)
    quantize = formats.get("int8_convrot").quantize if in_8_bits else lambda w: w
    one = term(quantize(down), up)
    # Of a matrix that two layers have in common, the second one's rows.
    both = torch.cat([make(R, K, seed=11), other[0]])
    two = LowRank(quantize(both), other[1], torch.full((3 * R,), -0.3), None, (R, 3 * R), object())
    got = linear(x, quantized, bias, low_rank=stacked([one, two]))
    want = linear(x, quantized, bias, low_rank=one).double()
    want += linear(x, quantized, None, low_rank=two).double() - linear(x, quantized).double()
    assert error(got, want) <= 8 * BF16


@pytest.fixture
def given(monkeypatch):
    """Let the way of Triton's kernels run here; return the ranks of what their product is given."""
    seen = []

    def run(x, weight, bias, **epilogue):
        # What it cannot add comes after it.
        if (term := epilogue.get("low_rank")) is not None:
            seen.append(term[0].shape[1])
        return backend.run_quantized(x, weight, bias, "reference", **epilogue)

    needs = registry.Needs(frozenset())
    ours = registry.Backend("linear", "ours", 0, needs, run, run, quantizes=True, fuses=True)
    select = registry.select
    monkeypatch.setattr(
        registry, "select", lambda op, *rest: ours if op == "linear" else select(op, *rest)
    )
    return seen


def beside_fp8(down, up, strength=STRENGTH, **given) -> LowRank:
    return term(formats.get("fp8_e4m3_rowwise").quantize(down), up, strength, **given)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_rowwise"])
@pytest.mark.parametrize("strength", [0.0, 1e-3, STRENGTH, 50.0, 1e6])
def test_term_of_any_size_beside_fp8_errs_as_the_format(layer, given, name, strength):
    x, weight, bias, down, up = layer
    x[3], x[4, 5] = 0, 100
    fmt = formats.get(name)
    got = linear(x, fmt.quantize(weight), bias, low_rank=beside_fp8(down, up, strength))
    want = x.double() @ (weight.double() + strength * up.double() @ down.double()).t()
    assert given == [R]
    # x is rounded, and the matrix that it is multiplied with.
    assert error(got, want + bias.double()) <= 2**0.5 * fmt.max_error
    assert torch.equal(got[3], bias)


def test_bias_of_a_term_reaches_a_token_of_zeros(layer, given):
    x, weight, bias, down, up = layer
    x[3], down[2] = 0, 0
    shift = torch.zeros(R)
    shift[2] = 3
    packed = formats.get("fp8_e4m3").quantize(weight)
    got = linear(x, packed, bias, low_rank=beside_fp8(down, up, shift=shift))
    assert given and error(got[3], bias.double() + 3 * up[:, 2].double()) <= 4 * BF16


def test_gelu_is_done_in_the_quantizer_of_both(layer, given):
    x, weight, bias, down, up = layer
    fmt = formats.get("fp8_e4m3")
    packed = fmt.quantize(weight)
    got = linear(x, packed, bias, input_act="gelu_tanh", low_rank=beside_fp8(down, up))
    active = torch.nn.functional.gelu(x, approximate="tanh")
    assert given
    # Here and below: x is rounded, and the matrix that it is multiplied with.
    assert error(got, wanted(active, weight, bias, down, up)) <= 2**0.5 * fmt.max_error


def test_first_matrix_in_fp8_goes_with_any_weight_and_input(layer, given):
    x, weight, bias, down, up = layer
    fmt = formats.get("fp8_e4m3")
    packed = fmt.quantize(weight)
    cases = [
        (x[:7], packed, R),
        (quantize_activation(x, packed), packed, R),
        (x.float(), packed, None),
        # What this one multiplies, the first matrix does not.
        (x, formats.get("int8_convrot").quantize(weight), R),
    ]
    for inputs, w, ranks in cases:
        got = linear(inputs, w, bias, low_rank=beside_fp8(down, up))
        assert (given.pop() if given else None) == ranks
        want = wanted(x[: len(got)], weight, bias, down, up)
        assert error(got, want) <= 2**0.5 * fmt.max_error


def test_stacked_terms_beside_fp8_are_one(layer, given):
    """Of strengths that differ, and with a bias in the second."""
    x, weight, bias, down, up = layer
    down[2], shift = 0, torch.zeros(R)
    shift[2] = 3
    one, two = beside_fp8(down, up), beside_fp8(down, 20 * up, 0.1, shift=shift)
    fmt = formats.get("fp8_e4m3")
    packed = fmt.quantize(weight)
    merged = weight.double() + (STRENGTH + 2) * up.double() @ down.double()
    want = x.double() @ merged.t() + bias.double() + 60 * up[:, 2].double()
    for terms in ([one, two], [term(down, up), two]):
        got = linear(x, packed, bias, low_rank=stacked(terms))
        assert given.pop() == 2 * R and error(got, want) <= 2**0.5 * fmt.max_error


def test_layers_that_share_an_input_project_it_once(layer, monkeypatch):
    x, weight, _, down, up = layer
    fmt = formats.get("int8_convrot")
    weights = [fmt.quantize(weight * scale) for scale in (1, 2)]
    both = fmt.quantize(torch.cat([down, down * 2]))
    key, calls = object(), []
    quantize = LowRank._product
    monkeypatch.setattr(LowRank, "_product", lambda self, x: calls.append(1) or quantize(self, x))
    terms = [LowRank(both, up, torch.ones(2 * R), None, rows, key) for rows in ((0, R), (R, 2 * R))]

    def run(w, t):
        share(x, 2)
        out = linear(x, w, low_rank=t)
        release(x)
        return out

    got = [run(w, t) for w, t in zip(weights, terms, strict=True)]
    assert len(calls) == 1
    assert not hasattr(x, "_lowbit_shared")
    want = [linear(x, w, low_rank=t) for w, t in zip(weights, terms, strict=True)]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_gelu_comes_before_both(layer):
    x, weight, bias, down, up = layer
    quantized = formats.get("int8_convrot").quantize(weight)
    active = torch.nn.functional.gelu(x, approximate="tanh")
    for matrix in (down, formats.get("int8_convrot").quantize(down)):
        got = linear(x, quantized, bias, input_act="gelu_tanh", low_rank=term(matrix, up))
        assert torch.equal(got, linear(active, quantized, bias, low_rank=term(matrix, up)))


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (5, 7)])
def test_any_number_of_tokens(layer, shape):
    _, weight, bias, down, up = layer
    x = make(*shape, K, seed=5)
    quantized = formats.get("int8_convrot").quantize(weight)
    got = linear(x, quantized, bias, low_rank=term(down, up))
    assert got.shape == (*shape, N)
    assert not x.numel() or error(got, wanted(x, weight, bias, down, up)) < 0.02


def test_result_of_another_layer_takes_the_term(layer):
    x, weight, bias, down, up = layer
    out = torch.nn.functional.linear(x, weight, bias)
    got = add_low_rank(out, x, term(down, up))
    assert got.data_ptr() == out.data_ptr()
    assert error(got, wanted(*layer)) <= 4 * BF16


def test_gradients_reach_the_input(layer):
    x, weight, _, down, up = layer
    x = x.float().requires_grad_()
    out = add_low_rank(torch.nn.functional.linear(x, weight.float()), x, term(down, up))
    out.sum().backward()
    want = (weight.float() + STRENGTH * up.float() @ down.float()).sum(0)
    torch.testing.assert_close(x.grad, want.expand(M, K), rtol=1e-4, atol=1e-4)


def test_one_scale_for_all_rows_is_refused(layer):
    x, weight, bias, down, up = layer
    one = formats.get("fp8_e4m3")
    with pytest.raises(ValueError, match="one per row"):
        linear(x, one.quantize(weight), bias, low_rank=term(one.quantize(down), up))


def test_kinds_stay_those_of_the_weight(layer):
    """A first matrix in 8 bits beside a weight that multiplies none takes x as it is."""
    x, weight, bias, down, up = layer
    small = formats.get("int8_convrot").quantize(down)
    quantized = formats.get("nvfp4").quantize(weight)
    assert activations.kind_of(quantized) is None
    got = linear(x, quantized, bias, low_rank=term(small, up))
    want = linear(x, quantized, bias, low_rank=term(down, up))
    assert error(got, want) < formats.get("int8_convrot").max_error


@pytest.mark.parametrize(
    ("h", "u", "kind", "message"),
    [
        (torch.ones(3, 16), torch.ones(8, 16), TypeError, "h is torch.float32"),
        (torch.ones(3, 16).half(), torch.ones(8, 16).bfloat16(), TypeError, "u torch.bfloat16"),
        (torch.ones(3, 16).char(), torch.ones(8, 16).char(), TypeError, "h is torch.int8"),
        (torch.ones(4, 16).half(), torch.ones(8, 16).half(), ValueError, r"\[3, R\]"),
        (torch.ones(3, 16).half(), torch.ones(8, 8).half(), ValueError, r"\[8, R\]"),
        (torch.ones(16, 3).half().t(), torch.ones(8, 16).half(), ValueError, "strides"),
        (torch.ones(3, 0).half(), torch.ones(8, 0).half(), ValueError, "R > 0"),
    ],
)
def test_factors_that_do_not_fit_are_refused(h, u, kind, message):
    a, b = torch.ones(3, 16, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)
    with pytest.raises(kind, match=message):
        scaled_mm(a, b, torch.ones(1), torch.ones(1), low_rank=(h, u))


def test_first_product_is_left_to_a_backend_that_makes_it_within(layer, monkeypatch):
    x, weight, bias, down, up = layer
    fmt = formats.get("int8_convrot")
    quantized, alone = fmt.quantize(weight), term(fmt.quantize(down), up)
    seen = []

    def run_quantized(x, weight, bias, low_rank=None, **rest):
        # Its own first product is a layer, too.
        if low_rank is not None:
            seen.append(low_rank[0])
        return backend.run_quantized(x, weight, bias, "reference", low_rank=low_rank, **rest)

    makes = registry.Backend(
        *("linear", "makes", 0, registry.Needs(frozenset()), None, run_quantized),
        **{"quantizes": True, "fuses": True, "projects": True},
    )
    want = linear(x, quantized, bias, low_rank=alone)
    monkeypatch.setattr(package, "_chosen", lambda *_: makes)
    got = linear(x, quantized, bias, low_rank=alone)
    assert isinstance(seen[0], Down) and error(got, want) <= 4 * BF16
    # Made once for layers that share it, and apart where it cannot be made within.
    wide = term(fmt.quantize(down.repeat(5, 1)), up.repeat(1, 5))
    for other in (dataclasses.replace(alone, key=object()), term(down, up), wide):
        linear(x, quantized, bias, low_rank=other)
        assert isinstance(seen[-1], torch.Tensor)
