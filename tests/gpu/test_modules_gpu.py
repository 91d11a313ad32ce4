"""`fp8_linear_forward` and the conversions on the GPU: every layout against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit.ops.linear import convert_fp4_linear, convert_fp8_linear, fp8_linear_forward
from lowbit.quant import formats

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = formats.get("fp8_e4m3_rowwise").max_error
NVFP4_ERROR = formats.get("nvfp4").max_error
# (tokens, N, K): aligned, padded, one token, a layer of Wan.
SIZES = [(64, 256, 512), (17, 50, 250), (1, 33, 63), (1000, 5120, 5120)]
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]
# From here on cuBLASLt takes every layout.
FIRST_WITH_ALL_LAYOUTS = (10, 0)


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def turned(x: torch.Tensor, turn: bool) -> torch.Tensor:
    return x.t().contiguous().t() if turn else x


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def module_of(n, k, weight_turned, biased, stored=E4M3, scale=None, scale_input=None) -> nn.Linear:
    module = nn.Linear(k, n, bias=biased, device="cuda").requires_grad_(False)
    weight = turned((make(n, k) * 4).to(stored), weight_turned)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if biased:
        module.bias.copy_(make(n, seed=3))
    module.scale_weight, module.scale_input = scale, scale_input
    return module


def want_of(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    scale = module.scale_weight
    weight = module.weight.double() * (1.0 if scale is None else scale.double().reshape(-1, 1))
    return F.linear(x.double(), weight, None if module.bias is None else module.bias.double())


def bound(*dtypes: torch.dtype) -> float:
    """Of rounding the activation, the weight or the output; Hopper adds with some 14 bits."""
    return ROUNDING + max(torch.finfo(dtype).eps for dtype in dtypes) + 2**-10


@pytest.mark.parametrize(("input_turned", "weight_turned"), LAYOUTS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale_input", [None, 0.012])
def test_every_layout_is_near_float64(
    input_turned, weight_turned, biased, dtype, size, scale_input
):
    m, n, k = size
    static = None if scale_input is None else torch.tensor(scale_input, device="cuda")
    module = module_of(n, k, weight_turned, biased, scale_input=static)
    x = turned(make(m, k, seed=1).to(dtype), input_turned)
    before = x.clone()
    got = fp8_linear_forward(module, dtype, x)
    assert (got.shape, got.dtype) == ((m, n), dtype)
    # Of few values not the average counts but the worst, half a step of E4M3.
    few = 2**-4 if m * k < 1000 else 0
    assert error(got, want_of(module, x)) <= max(few, bound(dtype))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("input_turned", "weight_turned"), LAYOUTS[1:])
def test_layouts_that_cublas_rejects_succeed_through_us(input_turned, weight_turned):
    if torch.cuda.get_device_capability() >= FIRST_WITH_ALL_LAYOUTS:
        pytest.skip("cuBLASLt takes every layout here")
    module, x = module_of(256, 512, weight_turned, False), turned(make(64, 512), input_turned)
    one = torch.ones((), device="cuda")
    a, b = turned(x.to(E4M3), input_turned), module.weight
    assert (a.stride(1) == 1, b.stride(1) == 1) == (not input_turned, not weight_turned)
    with pytest.raises((RuntimeError, ValueError)):
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    got = fp8_linear_forward(module, torch.bfloat16, x)
    assert error(got, want_of(module, x)) <= bound(torch.bfloat16)


def test_layout_that_cublas_accepts_is_the_one_that_weights_have():
    module, x = module_of(256, 512, False, False), make(64, 512)
    one = torch.ones((), device="cuda")
    got = torch._scaled_mm(
        x.to(E4M3), module.weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
    )
    assert error(got, want_of(module, x)) <= bound(torch.bfloat16)


@pytest.mark.parametrize("stored", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(), (256, 1)])
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_and_dtypes_are_honoured(stored, shape, base_dtype, dtype):
    scale = make(*shape).abs() * 0.02 + 0.01
    module = module_of(256, 512, False, True, stored, scale)
    x = make(2, 3, 512, seed=1).to(dtype)
    got = fp8_linear_forward(module, base_dtype, x)
    assert (got.shape, got.dtype) == ((2, 3, 256), base_dtype)
    assert error(got, want_of(module, x)) <= bound(dtype, base_dtype)


def test_tokens_of_very_different_norm_keep_their_precision():
    module, x = module_of(256, 512, False, False), make(512, 512).bfloat16()
    x[::2] *= 2.0**-20
    got, want = fp8_linear_forward(module, torch.bfloat16, x), want_of(module, x)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        assert error(got[part], want[part]) <= bound(torch.bfloat16)


@pytest.mark.parametrize("scale_input", [None, 0.012])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_token_and_no_other(bad, scale_input):
    static = None if scale_input is None else torch.tensor(scale_input, device="cuda")
    module = module_of(256, 512, False, False, scale_input=static)
    x = make(40, 512).bfloat16()
    clean = fp8_linear_forward(module, torch.bfloat16, x)
    x[7, 300] = bad
    got = fp8_linear_forward(module, torch.bfloat16, x)
    assert not torch.isfinite(got[7][module.weight[:, 300].float() != 0]).any()
    got[7] = clean[7]
    assert torch.equal(got, clean)


def stack(stored: torch.dtype) -> nn.Sequential:
    """Four layers of width 512 on the CPU."""
    layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).requires_grad_(False)
    for index, layer in enumerate(layers):
        weight = make(512, 512, seed=index).cpu() * 0.04
        layer.weight = nn.Parameter(weight.to(stored), requires_grad=False)
        layer.bias.copy_(make(512, seed=10 + index))
    return layers


@pytest.mark.parametrize(
    ("convert", "stored", "error_of_layer"),
    [(convert_fp8_linear, E4M3, ROUNDING), (convert_fp4_linear, torch.bfloat16, NVFP4_ERROR)],
)
def test_model_that_is_moved_and_undone(convert, stored, error_of_layer):
    model, x = stack(stored), make(100, 512, seed=1).bfloat16()
    want = x.double()
    for layer in model:
        want = F.linear(want, layer.weight.double().cuda(), layer.bias.double().cuda())
    originals = list(model)
    conversion = convert(model, torch.bfloat16)
    model.to("cuda")
    # Four layers one after the other; NVFP4 may round the activation too.
    assert error(model(x), want) <= 4 * 2 * (error_of_layer + 2**-8)
    conversion.undo()
    assert list(model) == originals
    assert all(parameter.is_cuda for parameter in model.parameters())


@pytest.mark.parametrize(
    ("convert", "stored"), [(convert_fp8_linear, E4M3), (convert_fp4_linear, torch.bfloat16)]
)
def test_compiled_model_is_one_graph(convert, stored):
    model, x = stack(stored), make(100, 512, seed=1).bfloat16()
    convert(model, torch.bfloat16)
    model.to("cuda")
    with torch.inference_mode():
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))
