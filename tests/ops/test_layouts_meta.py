"""The four layouts of two operands on the meta device, which refuses on any machine what cuBLASLt
refuses on a GPU: three of them, and widths that are no multiple of 16. All pass through us."""

import pytest
import torch

from lowbit.ops.linear import linear
from lowbit.ops.linear import triton as kernels
from lowbit.ops.scaled_mm import scaled_mm
from lowbit.quant import formats

FP8 = torch.float8_e4m3fn
M, N, K = 32, 48, 256
META = torch.device("meta")
LAYOUTS = [(a, b) for a in ("row", "column") for b in ("row", "column")]
NAMES = ("fp8_e4m3", "fp8_e4m3_rowwise", "int8", "int8_convrot")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x [rows, columns], the elements of a row, or of a column, side by side."""
    return x.contiguous() if layout == "row" else x.t().contiguous().t()


def on_meta(rows: int, columns: int, layout: str, dtype: torch.dtype = FP8) -> torch.Tensor:
    return laid_out(torch.empty(rows, columns, dtype=dtype, device=META), layout)


def raw(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch's product of a [M, K] and b [K, N]."""
    one = torch.ones((), device=META)
    return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ("row", "row", r"mat2 must be col_major, got stride \(48, 1\)"),
        ("column", "row", r"self must be row_major, got stride \(1, 32\)"),
        ("column", "column", r"self must be row_major, got stride \(1, 32\)"),
    ],
)
def test_torch_refuses_three_layouts(a, b, reason):
    with pytest.raises(RuntimeError, match=reason):
        raw(on_meta(M, K, a), on_meta(K, N, b))


def test_torch_takes_the_fourth():
    assert raw(on_meta(M, K, "row"), on_meta(K, N, "column")).shape == (M, N)


def test_torch_refuses_the_transposed_weight_made_contiguous():
    """What wrappers do: the transposed weight is right, and .contiguous() undoes it."""
    weight = on_meta(N, K, "row")
    assert raw(on_meta(M, K, "row"), weight.t()).shape == (M, N)
    with pytest.raises(RuntimeError, match="mat2 must be col_major"):
        raw(on_meta(M, K, "row"), weight.t().contiguous())


@pytest.mark.parametrize(
    ("n", "k", "reason"),
    [
        (48, 40, r"self.size\(1\) to be divisible by 16, but got self.size\(1\)=40"),
        (40, 64, r"Expected both dimensions of mat2 to be divisible by 16"),
    ],
)
def test_torch_refuses_widths_that_16_does_not_divide(n, k, reason):
    with pytest.raises(RuntimeError, match=reason):
        raw(on_meta(M, k, "row"), on_meta(k, n, "column"))


@pytest.mark.parametrize(("a", "b"), LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_linear_takes_an_activation_and_a_weight_of_any_layout(name, a, b):
    """Whatever runs it: what `auto` takes, or our kernels."""
    weight = laid_out(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), b)
    quantized = formats.get(name).quantize(weight).to(META)
    x = on_meta(M, K, a, torch.bfloat16)
    for got in (linear(x, quantized), kernels.run(x, quantized, None, "auto")):
        assert (got.shape, got.dtype, got.device) == ((M, N), torch.bfloat16, META)


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_the_weight_gives_the_same_values(name):
    """On the CPU, to the bit."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, K, generator=generator) for rows in (5, N))
    row, column = (formats.get(name).quantize(laid_out(weight, b)) for b in ("row", "column"))
    assert torch.equal(kernels.run(x, column, None, "auto"), kernels.run(x, row, None, "auto"))


@pytest.mark.parametrize(("a", "b"), LAYOUTS)
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_product_of_eight_bits_is_given_or_says_what_to_do(a, b, dtype):
    """b is [N, K] here: one layout of the four is right, and .contiguous() makes it of the rest."""
    x, w, one = on_meta(M, K, a, dtype), on_meta(N, K, b, dtype), torch.ones((), device=META)
    wrong = [name for name, layout in (("a", a), ("b", b)) if layout == "column"]
    if wrong:
        message = rf"{wrong[0]} has strides .*K-contiguous rows.*call \.contiguous\(\) on it before"
        with pytest.raises(ValueError, match=message):
            scaled_mm(x, w, one, one)
    assert scaled_mm(x.contiguous(), w.contiguous(), one, one).shape == (M, N)


def test_weight_that_was_transposed_is_named():
    one = torch.ones((), device=META)
    with pytest.raises(ValueError, match=r"a \[M, K\] and b \[N, K\] are wanted: b is not transp"):
        scaled_mm(on_meta(M, K, "row"), on_meta(K, N, "row"), one, one)


def test_any_number_of_outputs_and_a_width_of_16_are_taken():
    one = torch.ones((), device=META)
    for n in (1, 5, 40):
        assert scaled_mm(on_meta(M, 16, "row"), on_meta(n, 16, "row"), one, one).shape == (M, n)


def test_width_that_16_does_not_divide_is_to_be_padded():
    one = torch.ones((), device=META)
    with pytest.raises(
        ValueError, match="K=40 is not a positive multiple of 16; pad both operands"
    ):
        scaled_mm(on_meta(M, 40, "row"), on_meta(N, 40, "row"), one, one)
