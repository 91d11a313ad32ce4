"""Models whose Linears are converted to FP8 or NVFP4: what changes, what does not, and undoing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit.ops.linear import convert_fp8_linear, fp8_linear_forward
from tests.ops.linear.models import (
    DTYPES,
    KEPT,
    KINDS,
    LAYERS,
    NVFP4_ERROR,
    SCALE,
    SCALES,
    WIDTH,
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


def test_fp8_model_computes_its_values():
    model, conversion = converted("fp8")
    x = make(9, WIDTH)
    # The backend of a CPU does not round the activation.
    assert error(model(x), values_of(model)(x.double())) <= 1e-6
    assert conversion.names == LAYERS


@pytest.mark.parametrize("base_dtype", DTYPES)
def test_outputs_are_of_the_base_dtype(kind, base_dtype):
    model = fp8_model()
    KINDS[kind](model, base_dtype, KEPT, SCALES)
    linear = model.blocks[0].ffn[0]
    for dtype in DTYPES:
        assert linear(make(3, WIDTH).to(dtype)).dtype == base_dtype


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_number_of_dimensions(kind, lead):
    model, _ = converted(kind)
    linear, x = model.blocks[0].ffn[0], make(*lead, WIDTH)
    got = linear(x)
    assert got.shape == (*lead, 80)
    torch.testing.assert_close(got.reshape(-1, 80), linear(x.reshape(-1, WIDTH)))


def test_what_is_kept_is_the_very_module(kind):
    model = fp8_model()
    before = dict(model.named_modules())
    KINDS[kind](model, torch.float32, KEPT, SCALES)
    after = dict(model.named_modules())
    assert {name for name in before if after[name] is not before[name]} == set(LAYERS)
    for name in LAYERS:
        assert isinstance(after[name], nn.Linear)
        assert "forward" not in after[name].__dict__


def test_layer_is_kept_by_any_part_of_its_weights_name():
    for part, changed in [("ffn", 0), ("ffn.0.weight", 2), ("blocks.1", 2), ("nothing", 4)]:
        model = fp8_model()
        assert len(convert_fp8_linear(model, torch.float32, {*KEPT, part}, SCALES).names) == changed


def test_names_and_keys_stay(kind):
    model = fp8_model()
    names, keys = [n for n, _ in model.named_modules()], list(model.state_dict())
    parameters = [n for n, _ in model.named_parameters()]
    KINDS[kind](model, torch.float32, KEPT, SCALES)
    assert [n for n, _ in model.named_modules()] == names
    assert [n for n, _ in model.named_parameters()] == parameters
    assert list(model.state_dict()) == keys


def test_fp8_weights_are_neither_copied_nor_changed():
    model = fp8_model()
    before = {name: parameter for name, parameter in model.named_parameters()}
    bits = {name: parameter.clone() for name, parameter in before.items()}
    convert_fp8_linear(model, torch.float32, KEPT, SCALES)
    model(make(3, WIDTH))
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter.float(), bits[name].float())


def test_scales_of_the_caller_are_not_written_to(kind):
    model = fp8_model()
    scales = {key: value.clone() for key, value in SCALES.items()}
    KINDS[kind](model, torch.float32, KEPT, scales)
    model.half()
    assert scales == SCALES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (80,), (80, 1), (1, 80)])
def test_scale_of_any_shape_is_honoured(kind, dtype, shape):
    model = fp8_model()
    scale = (make(*shape).abs() + 0.5).to(dtype)
    KINDS[kind](model, torch.float32, KEPT, {"blocks.0.ffn.0.scale_weight": scale})
    linear, x = model.blocks[0].ffn[0], make(50, WIDTH, seed=5)
    weight = fp8_model().blocks[0].ffn[0].weight.double() * scale.double().reshape(-1, 1)
    want = F.linear(x.double(), weight, linear.bias.double())
    assert error(linear(x), want) <= (NVFP4_ERROR if kind == "fp4" else 1e-6)


def test_scale_that_is_no_tensor_is_refused(kind):
    with pytest.raises(TypeError, match=r"blocks.0.ffn.0.scale_weight as 2.0; a tensor is wanted"):
        KINDS[kind](fp8_model(), torch.float32, KEPT, {"blocks.0.ffn.0.scale_weight": 2.0})


def test_scale_that_is_an_attribute_is_honoured(kind):
    model, given = fp8_model(), fp8_model()
    for name in LAYERS:
        model.get_submodule(name).scale_weight = torch.tensor(SCALE)
    KINDS[kind](model, torch.float32, KEPT)
    KINDS[kind](given, torch.float32, KEPT, SCALES)
    x = make(3, WIDTH)
    assert torch.equal(model(x), given(x))


def test_fp8_weight_without_a_scale_has_scale_one(kind):
    model, given = fp8_model(), fp8_model()
    KINDS[kind](model, torch.float32, KEPT)
    KINDS[kind](given, torch.float32, KEPT, {k: torch.ones(()) for k in SCALES})
    x = make(3, WIDTH)
    assert torch.equal(model(x), given(x))


def test_static_scale_of_a_file_is_honoured():
    model = fp8_model()
    scales = {**SCALES, "blocks.0.ffn.0.scale_input": torch.tensor(1e-3)}
    convert_fp8_linear(model, torch.float32, KEPT, scales)
    linear = model.blocks[0].ffn[0]
    # Beyond 448 · 1e-3 all inputs are one.
    assert torch.equal(linear(torch.full((WIDTH,), 1.0)), linear(torch.full((WIDTH,), 9.0)))


def test_scale_in_the_state_dict_stays_there_and_is_honoured():
    model, given = fp8_model(), fp8_model()
    for name in LAYERS:
        scale = nn.Parameter(torch.tensor(SCALE), requires_grad=False)
        model.get_submodule(name).scale_weight = scale
    keys = list(model.state_dict())
    convert_fp8_linear(model, torch.float32, KEPT)
    convert_fp8_linear(given, torch.float32, KEPT, SCALES)
    assert list(model.state_dict()) == keys
    x = make(3, WIDTH)
    assert torch.equal(model.bfloat16().float()(x), given.bfloat16().float()(x))


def test_wrong_prefix_of_scales_is_named(kind):
    model = fp8_model()
    with pytest.raises(ValueError, match=r"diffusion_model\.blocks\.0.*is a prefix to be removed"):
        KINDS[kind](
            model, torch.float32, KEPT, {f"diffusion_model.{k}": v for k, v in SCALES.items()}
        )


def test_undo_puts_the_original_modules_back(kind):
    model, reference = fp8_model(), fp8_model()
    before = dict(model.named_modules())
    attributes = {name: dict(module.__dict__) for name, module in before.items()}
    conversion = KINDS[kind](model, torch.float32, KEPT, SCALES)
    model(make(3, WIDTH))
    conversion.undo()
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(after[name].__dict__ == attributes[name] for name in before)
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key].float(), value.float())
    assert conversion.names == ()
    conversion.undo()
    assert all(module is before[name] for name, module in model.named_modules())


def test_conversion_can_be_made_again_once_undone(kind):
    model, conversion = converted(kind)
    x = make(3, WIDTH)
    want = model(x)
    conversion.undo()
    KINDS[kind](model, torch.float32, KEPT, SCALES)
    assert torch.equal(model(x), want)


def test_undo_refuses_when_another_module_took_the_place(kind):
    model, conversion = converted(kind)
    mine = model.blocks[0].ffn[0]
    model.blocks[1].ffn[2] = nn.Linear(80, WIDTH)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.ffn\.2 was replaced again"):
        conversion.undo()
    assert model.blocks[0].ffn[0] is mine


@pytest.mark.parametrize("second", KINDS)
def test_converting_twice_is_refused_and_changes_nothing(kind, second):
    model, _ = converted(kind)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.0 is converted already; undo"):
        KINDS[second](model, torch.float32, ("modulation",), SCALES)
    assert all(module is modules[name] for name, module in model.named_modules())


def test_shared_module_stays_shared(kind):
    model = fp8_model()
    model.blocks[1].ffn[0] = shared = model.blocks[0].ffn[0]
    conversion = KINDS[kind](model, torch.float32, KEPT, SCALES)
    assert model.blocks[1].ffn[0] is model.blocks[0].ffn[0] is not shared
    conversion.undo()
    assert model.blocks[1].ffn[0] is model.blocks[0].ffn[0] is shared


def test_input_is_never_written_to(kind):
    model, _ = converted(kind)
    x = make(5, WIDTH) * 1e4
    before = x.clone()
    model.blocks[0].ffn[0](x)
    assert torch.equal(x, before)


def test_nan_propagates_to_its_token_only(kind):
    model, _ = converted(kind)
    linear, x = model.blocks[0].ffn[0], make(4, WIDTH)
    clean = linear(x)
    x[1, 3] = torch.nan
    got = linear(x)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])


def test_function_and_module_are_one():
    model, _ = converted("fp8")
    linear, x = model.blocks[0].ffn[0], make(3, WIDTH)
    assert torch.equal(fp8_linear_forward(linear, torch.float32, x), linear(x))


@pytest.mark.parametrize(
    ("change", "args", "kind_of_error", "text"),
    [
        (None, (torch.int8,), TypeError, "base_dtype is torch.int8"),
        (None, (torch.float32, "norm"), TypeError, "params_to_keep is 'norm'; a collection"),
        (
            None,
            (torch.float32, (), {"head.scale_weight": torch.ones(3)}),
            ValueError,
            r"head\.scale_weight is \[3\]; 1 or 5 elements",
        ),
        ("forward", (torch.float32,), ValueError, "head has a forward of its own"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(kind, change, args, kind_of_error, text):
    model = Model()
    if change:
        model.head.forward = lambda x: x
    modules = dict(model.named_modules())
    with pytest.raises(kind_of_error, match=text):
        KINDS[kind](model, *args)
    assert all(module is modules[name] for name, module in model.named_modules())


def test_linear_that_nothing_holds_is_refused(kind):
    with pytest.raises(ValueError, match="convert its parent, or call fp8_linear_forward"):
        KINDS[kind](nn.Linear(4, 4), torch.float32)
