"""`fp8_linear_forward` on plain `nn.Linear` modules, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowbit.ops.linear import (
    QuantizedActivation,
    fp8,
    fp8_linear_forward,
    quantize_activation,
    share,
    sharing,
)
from lowbit.ops.linear import triton as kernels
from lowbit.quant import formats

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative L2 error of rounding to E4M3, whose scale is that of a row.
ROUNDING = formats.get("fp8_e4m3_rowwise").max_error
N, K = 48, 256


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module_of(n=N, k=K, dtype=E4M3, bias=None, scale=None, scale_input=None) -> nn.Linear:
    """A Linear with an FP8 weight; scale: None, "tensor" or "channel"; bias: its dtype."""
    module = nn.Linear(k, n, bias=bias is not None).requires_grad_(False)
    module.weight = nn.Parameter((make(n, k) * 4).to(dtype), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(make(n, seed=3).to(bias), requires_grad=False)
    if scale:
        module.scale_weight = torch.tensor(0.02) if scale == "tensor" else make(n, 1).abs() * 0.02
    if scale_input is not None:
        module.scale_input = torch.tensor(scale_input)
    return module


def want_of(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    scale = getattr(module, "scale_weight", None)
    weight = module.weight.double() * (1.0 if scale is None else scale.double().reshape(-1, 1))
    return F.linear(x.double(), weight, None if module.bias is None else module.bias.double())


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def bound(x: torch.Tensor, base_dtype: torch.dtype, rounds: bool) -> float:
    """Of rounding the weight and the output to the coarser of the dtypes, and the activation."""
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(base_dtype).eps)
    # Sums of float32 in other orders differ from each other as much as from float64.
    return eps + (ROUNDING if rounds else 0) + 1e-6


def by_kernels(x, weight, bias=None):
    """`linear` by our kernels, with their reference in their place."""
    if not isinstance(x, QuantizedActivation):
        x = quantize_activation(x, weight, backend="reference")
    out = kernels.run_quantized(x, weight, bias, "reference")
    return out.reshape(*x.shape[:-1], weight.shape[0])


@pytest.fixture(params=["chosen", "kernels"])
def rounds(request, monkeypatch) -> bool:
    """Whether the activation is rounded: by our kernels, not by the backend that a CPU takes."""
    if request.param == "kernels":
        monkeypatch.setattr(fp8, "linear", by_kernels)
    return request.param == "kernels"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [None, "tensor", "channel"])
@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
def test_product_is_that_of_the_values(dtype, stored, scale, bias, rounds):
    module, x = module_of(dtype=stored, scale=scale, bias=bias), make(7, K, seed=1).to(dtype)
    got = fp8_linear_forward(module, dtype, x)
    assert (got.shape, got.dtype) == ((7, N), dtype)
    assert error(got, want_of(module, x)) <= bound(x, dtype, rounds)


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_of_the_base_dtype_and_as_exact(base_dtype, dtype, rounds):
    module, x = module_of(scale="tensor", bias=torch.float32), make(7, K, seed=1).to(dtype)
    got = fp8_linear_forward(module, base_dtype, x)
    assert got.dtype == base_dtype
    assert error(got, want_of(module, x)) <= bound(x, base_dtype, rounds)


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (2, 2, 2, 2)])
@pytest.mark.parametrize("scale_input", [None, 0.01])
def test_any_number_of_dimensions(lead, scale_input, rounds):
    module, x = module_of(bias=torch.float32, scale_input=scale_input), make(*lead, K, seed=1)
    got = fp8_linear_forward(module, torch.float32, x)
    assert got.shape == (*lead, N)
    rounds = rounds or scale_input is not None
    assert error(got, want_of(module, x)) <= bound(x, torch.float32, rounds)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 4, 3)])
@pytest.mark.parametrize("scale_input", [None, 0.01])
@pytest.mark.parametrize("k", [K, 17])
def test_empty_batch_gives_an_empty_output(lead, scale_input, k):
    module = module_of(k=k, scale_input=scale_input)
    got = fp8_linear_forward(module, torch.bfloat16, make(*lead, k))
    assert (got.shape, got.dtype) == ((*lead, N), torch.bfloat16)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 17), (33, 250), (48, 63), (50, 256)])
@pytest.mark.parametrize("stored", [E4M3, E5M2])
@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("scale_input", [None, 0.01])
def test_sizes_are_padded_with_zeros(n, k, stored, scale, scale_input, rounds, monkeypatch):
    module = module_of(n, k, stored, torch.float32, scale, scale_input)
    x, seen = make(100, k, seed=1), []
    run = fp8.linear

    def record(a, b, *args):
        seen.append((*a.shape, *b.shape))
        return run(a, b, *args)

    monkeypatch.setattr(fp8, "linear", record)
    got = fp8_linear_forward(module, torch.float32, x)
    rounds = rounds or scale_input is not None
    assert got.shape == (100, n)
    # Of one feature, most outputs are one rounded value: half a step of E4M3 at worst.
    limit = 2**-4 if k == 1 else bound(x, torch.float32, rounds)
    assert error(got, want_of(module, x)) <= limit
    columns, rows = -(-k // 16) * 16, -(-n // 16) * 16
    assert seen == [(100, columns, rows, columns)]


def views(x: torch.Tensor, filler: float = torch.nan) -> dict[str, torch.Tensor]:
    """Views with the values of x [M, K], with `filler` around them."""
    m, k = x.shape
    wide = torch.full((m, 2 * k), filler, dtype=x.dtype)
    wide[:, ::2] = x
    tall = torch.full((3 * m, k + 8), filler, dtype=x.dtype)
    tall[::3, 3 : k + 3] = x
    return {"columns": wide[:, ::2], "rows": tall[::3, 3 : k + 3], "turned": x.t().contiguous().t()}


@pytest.mark.parametrize("view", ["columns", "rows", "turned"])
@pytest.mark.parametrize("scale_input", [None, 0.01])
def test_strides_of_the_input_do_not_matter(view, scale_input, rounds):
    module, x = module_of(scale_input=scale_input), make(6, K, seed=1)
    want = fp8_linear_forward(module, torch.float32, x)
    assert torch.equal(fp8_linear_forward(module, torch.float32, views(x)[view]), want)
    swapped = x.reshape(2, 3, K).transpose(0, 1)
    got = fp8_linear_forward(module, torch.float32, swapped)
    assert torch.equal(got, want.reshape(2, 3, N).transpose(0, 1))


@pytest.mark.parametrize("view", ["columns", "rows", "turned"])
def test_strides_of_the_weight_do_not_matter(view, rounds):
    module, x = module_of(), make(6, K, seed=1)
    want = fp8_linear_forward(module, torch.float32, x)
    # A byte of ones is a NaN in E4M3.
    stored = views(module.weight.view(torch.uint8), filler=0xFF)[view].view(E4M3)
    assert not stored.is_contiguous()
    module.weight = nn.Parameter(stored, requires_grad=False)
    assert torch.equal(fp8_linear_forward(module, torch.float32, x), want)


def raw(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch's product of FP8 matrices a [M, K] and b [K, N], on the meta device."""
    one = torch.ones((), device="meta")
    return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("input_turned", [False, True])
@pytest.mark.parametrize("weight_turned", [False, True])
def test_every_layout_reaches_the_product_as_cublas_wants_it(
    input_turned, weight_turned, monkeypatch
):
    """The meta device raises what cuBLASLt does for the three layouts that it refuses."""

    def turned(x: torch.Tensor, turn: bool) -> torch.Tensor:
        return x.t().contiguous().t() if turn else x

    x = turned(make(32, K), input_turned)
    module = module_of()
    module.weight = nn.Parameter(turned(module.weight.detach(), weight_turned), requires_grad=False)
    a, b = (t.to(E4M3).to("meta") for t in (x, module.weight.detach()))
    if input_turned or weight_turned:
        with pytest.raises(RuntimeError, match=r"must be (row|col)_major"):
            raw(a, b.t())
    else:
        assert raw(a, b.t()).shape == (32, N)
    seen = []

    def linear(x, weight, bias=None):
        x = quantize_activation(x, weight)
        seen.append(raw(x.stored.to("meta"), weight._qdata.to("meta").t()))
        return by_kernels(x, weight, bias)

    monkeypatch.setattr(fp8, "linear", linear)
    got = fp8_linear_forward(module, torch.float32, x)
    assert [t.shape for t in seen] == [(32, N)]
    assert error(got, want_of(module, x)) <= bound(x, torch.float32, True)


def test_row_major_copy_of_a_transposed_weight_is_what_cublas_refuses():
    """The fault behind the error in wrappers: `.t().contiguous()`."""
    a, b = (torch.empty(m, K, device="meta", dtype=E4M3) for m in (32, N))
    with pytest.raises(RuntimeError, match="mat2 must be col_major"):
        raw(a, b.t().contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_input", [None, 0.001])
@pytest.mark.parametrize("k", [K, 17])
def test_nothing_of_the_caller_is_written_to(dtype, scale_input, k, rounds):
    module = module_of(k=k, bias=dtype, scale="channel", scale_input=scale_input)
    x = make(9, k, seed=1).to(dtype) * 1000
    given = {"x": x, **dict(module.named_parameters()), "scale": module.scale_weight}
    if scale_input is not None:
        given["scale_input"] = module.scale_input
    before = {name: tensor.clone() for name, tensor in given.items()}
    fp8_linear_forward(module, dtype, x)
    for name, tensor in given.items():
        assert torch.equal(tensor.float(), before[name].float()), name


@pytest.mark.parametrize("scale_input", [None, 0.01])
@pytest.mark.parametrize("stored", [E4M3, E5M2])
def test_zero_tokens_give_the_bias(scale_input, stored, rounds):
    module = module_of(dtype=stored, bias=torch.float32, scale="tensor", scale_input=scale_input)
    got = fp8_linear_forward(module, torch.float32, torch.zeros(3, K))
    assert torch.equal(got, module.bias.expand(3, -1))


@pytest.mark.parametrize("scale_input", [None, 0.01])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_token_and_no_other(bad, scale_input, rounds):
    module, x = module_of(scale_input=scale_input), make(5, K, seed=1)
    clean = fp8_linear_forward(module, torch.float32, x)
    x[2, 30] = bad
    got = fp8_linear_forward(module, torch.float32, x)
    assert not torch.isfinite(got[2][module.weight[:, 30].float() != 0]).any()
    assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_tokens_of_very_different_norm_keep_their_precision(rounds):
    module, x = module_of(scale="tensor"), make(64, K, seed=1)
    x[::2] *= 2.0**-20
    got, want = fp8_linear_forward(module, torch.float32, x), want_of(module, x)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        assert error(got[part], want[part]) <= bound(x, torch.float32, rounds)


def test_input_that_layers_share_is_seen_as_shared(monkeypatch):
    module, x, seen = module_of(), make(2, 3, K), []

    def linear(x, weight, bias=None):
        seen.append(hasattr(x, sharing.ATTRIBUTE))
        return by_kernels(x, weight, bias)

    monkeypatch.setattr(fp8, "linear", linear)
    share(x, 2)
    fp8_linear_forward(module, torch.float32, x)
    assert seen == [True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_scale_rounds_to_its_grid(dtype):
    """Multiples of the scale that E4M3 holds are exact, those beyond its range saturate."""
    codes = torch.arange(-8, 8).float()
    module = module_of(n=16, k=16, scale_input=0.25)
    module.weight = nn.Parameter(torch.eye(16).to(E4M3), requires_grad=False)
    x = torch.stack([codes * 0.25, codes * 1e3]).to(dtype)
    got = fp8_linear_forward(module, torch.float32, x)
    assert torch.equal(got[0], codes * 0.25)
    assert torch.equal(got[1], codes.sign() * 448 * 0.25)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, "tensor", "channel"])
@pytest.mark.parametrize("bias", [None, torch.float32])
@pytest.mark.parametrize("stored", [E4M3, E5M2])
def test_static_scale_is_honoured(dtype, scale, bias, stored):
    module = module_of(dtype=stored, scale=scale, bias=bias, scale_input=0.01)
    x = make(7, K, seed=1).to(dtype)
    got = fp8_linear_forward(module, dtype, x)
    assert got.dtype == dtype
    assert error(got, want_of(module, x)) <= bound(x, dtype, True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_weight_that_is_not_fp8_runs_as_the_module_does(dtype):
    module = nn.Linear(K, N).to(dtype)
    module.scale_weight = torch.tensor(3.0)
    x = make(4, K).to(dtype)
    got = fp8_linear_forward(module, torch.bfloat16, x)
    assert torch.equal(got, F.linear(x, module.weight, module.bias))
    assert got.requires_grad


def test_forward_of_the_class_is_taken_not_one_that_a_wrapper_assigned():
    """Wrappers assign a `forward` that calls this one."""
    module = nn.Linear(K, N)
    module.forward = lambda x: fp8_linear_forward(module, torch.float32, x)
    x = make(4, K)
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))


def test_bias_in_fp8_is_read_by_its_values():
    module, x = module_of(bias=E4M3), make(4, K, seed=1)
    got = fp8_linear_forward(module, torch.float32, x)
    assert error(got, want_of(module, x)) <= bound(x, torch.float32, False)


@pytest.mark.parametrize(
    ("change", "x", "kind", "text"),
    [
        ({}, (make(2, K + 1),), ValueError, r"input is \[2, 257\], weight \[48, 256\] takes"),
        ({}, (make(2, K).double(),), TypeError, "input is torch.float64; cast it"),
        ({}, (make(2, K).to(E4M3),), TypeError, "input is torch.float8_e4m3fn; cast it"),
        ({"scale_weight": torch.ones(7)}, (), ValueError, r"scale_weight is \[7\]; 1 or 48"),
        ({"scale_input": torch.ones(2)}, (), ValueError, r"scale_input is \[2\]; 1 elements"),
    ],
)
def test_what_does_not_fit_is_named(change, x, kind, text):
    module = module_of()
    module.__dict__.update(change)
    with pytest.raises(kind, match=text):
        fp8_linear_forward(module, torch.bfloat16, *(x or (make(2, K),)))


def test_unknown_base_dtype_is_refused():
    with pytest.raises(TypeError, match=r"base_dtype is torch.int8; torch.bfloat16"):
        fp8_linear_forward(module_of(), torch.int8, make(2, K))
