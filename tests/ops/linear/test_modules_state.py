"""Converted modules that are moved, cast, copied, loaded, compiled."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit.ops.linear import convert_fp4_linear, convert_fp8_linear
from tests.ops.linear.models import (
    DTYPES,
    E4M3,
    E5M2,
    KEPT,
    KINDS,
    LAYERS,
    SCALES,
    WIDTH,
    Block,
    Model,
    converted,
    error,
    fp8_model,
    make,
    values_of,
)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_undone_model_is_where_the_converted_one_was_moved(kind):
    model, conversion = converted(kind)
    model.to("meta").eval()
    conversion.undo()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_undone_fp8_model_has_what_was_loaded_meanwhile():
    model, conversion = converted("fp8")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["blocks.0.ffn.0.weight"] = torch.ones(80, WIDTH).to(E4M3)
    model.load_state_dict(state)
    conversion.undo()
    assert torch.equal(model.blocks[0].ffn[0].weight.float(), torch.ones(80, WIDTH))


def test_originals_are_freed_with_the_conversion():
    model = fp8_model()
    original = weakref.ref(model.blocks[0].ffn[0].weight)
    conversion = convert_fp4_linear(model, torch.float32, KEPT, SCALES)
    assert original() is not None
    del conversion
    gc.collect()
    assert original() is None


def test_copy_is_independent(kind):
    model, conversion = converted(kind)
    x = make(3, WIDTH)
    want, twin = model(x), copy.deepcopy(model)
    assert torch.equal(twin(x), want)
    for name in LAYERS:
        mine, other = model.get_submodule(name), twin.get_submodule(name)
        assert type(other) is type(mine)
        one, two = (getattr(m.weight, "_qdata", m.weight) for m in (mine, other))
        assert one.data_ptr() != two.data_ptr()
    conversion.undo()
    assert torch.equal(twin(x), want)


@pytest.mark.parametrize("cast", DTYPES)
def test_casting_the_model_leaves_its_values(kind, cast):
    model, _ = converted(kind)
    x = make(3, WIDTH)
    linear = model.blocks[0].ffn[0]
    linear.bias.data.zero_()
    want = linear(x)
    model.to(cast)
    assert model.head.weight.dtype == linear.bias.dtype == cast
    assert torch.equal(model.blocks[0].ffn[0](x), want)
    if kind == "fp8":
        assert linear.weight.dtype == E4M3
        assert linear.scale_weight.dtype == torch.float32
    else:
        assert linear.weight.dtype == cast
        assert linear.weight._qdata.dtype == torch.uint8


@pytest.mark.parametrize("move", [lambda m: m.to("meta"), lambda m: m.to("meta", torch.float16)])
def test_everything_moves_to_the_device(kind, move):
    model, _ = converted(kind)
    move(model)
    for name in LAYERS:
        linear = model.get_submodule(name)
        assert linear.weight.is_meta
        assert linear.bias is None or linear.bias.is_meta
        if kind == "fp8":
            assert linear.scale_weight.is_meta
        else:
            params = linear.weight._params
            assert linear.weight._qdata.is_meta
            assert params.scale.is_meta
            assert params.block_scale.is_meta
    assert model(make(3, WIDTH).to(model.head.weight)).is_meta


def test_other_casts_of_modules_work(kind):
    model, _ = converted(kind)
    for cast in (model.half, model.bfloat16, model.double, model.float):
        cast()
        assert model.blocks[0].ffn[0](make(3, WIDTH)).isfinite().all()


def test_state_of_a_converted_model_loads_into_another(kind):
    model, _ = converted(kind)
    other, _ = converted(kind)
    for name in LAYERS:
        model.get_submodule(name).bias is None or model.get_submodule(name).bias.data.fill_(7)
    other.load_state_dict(model.state_dict())
    x = make(3, WIDTH)
    assert torch.equal(other(x), model(x))


def test_weights_that_are_loaded_later_run_by_what_they_are():
    """Wrappers convert first and put the weights in their places when they sample."""
    model = Model().to("meta")
    conversion = convert_fp8_linear(model, torch.float32, KEPT, SCALES)
    for name, parameter in fp8_model().named_parameters():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._parameters[attribute] = parameter
    x = make(9, WIDTH)
    assert error(model(x), values_of(model)(x.double())) <= 1e-6
    conversion.undo()
    assert model.blocks[0].ffn[0].weight.dtype == E4M3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_that_are_not_fp8_run_as_before(dtype):
    model = Model().to(dtype)
    x = make(9, WIDTH).to(dtype)
    want = model(x)
    convert_fp8_linear(model, torch.bfloat16)
    assert torch.equal(model(x), want)


class Scaled(nn.Linear):
    """A Linear with a forward of its own, as packs have them."""

    def forward(self, x):
        return 2 * super().forward(x)

    def helper(self):
        return "mine"


@pytest.mark.parametrize("kind_of_weight", ["fp8", "float"])
def test_class_of_the_original_is_kept(kind_of_weight):
    parent = nn.Sequential(Scaled(WIDTH, 16))
    parent.requires_grad_(False)
    linear, x = parent[0], make(3, WIDTH)
    if kind_of_weight == "fp8":
        linear.weight = nn.Parameter(linear.weight.to(E5M2), requires_grad=False)
        want = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    else:
        want = linear(x).double()
    convert_fp8_linear(parent, torch.float32)
    assert isinstance(parent[0], Scaled)
    assert parent[0].helper() == "mine"
    assert error(parent[0](x), want) <= 1e-6


def test_hooks_are_those_of_the_original(kind):
    model, seen = fp8_model(), []
    hook = model.blocks[0].ffn[0].register_forward_hook(lambda *args: seen.append("hook"))
    KINDS[kind](model, torch.float32, KEPT, SCALES)
    model(make(3, WIDTH))
    hook.remove()
    model(make(3, WIDTH))
    assert seen == ["hook"]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_compiled_model_is_one_graph_and_blocks_do_not_recompile(kind, mode):
    model, _ = converted(kind)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    x = make(3, WIDTH)
    with mode():
        want = [block(x) for block in model.blocks]
        whole = torch.compile(model, fullgraph=True, backend=count)
        assert torch.equal(whole(x), model(x))
        assert len(graphs) == 1
        compiled = torch.compile(Block.forward, fullgraph=True, backend=count)
        for block, expected in zip(model.blocks, want, strict=True):
            assert torch.equal(compiled(block, x), expected)
    assert len(graphs) == 2
