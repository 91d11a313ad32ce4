"""What the host does with a weight beside multiplying by it: shapes, copies, moves, LoRA."""

import pytest
import torch

from lowbit.quant import formats

SHAPES = [(160, 512), (33, 256)]
# Products in float32 of values near 1; the sums of 256 are in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=SHAPES, ids=str)
def weight(request, fmt, quantized):
    return quantized(fmt, request.param)


def assert_values(got: torch.Tensor, want: torch.Tensor) -> None:
    """`got` may be quantized or not; adding zero makes it a plain tensor either way."""
    torch.testing.assert_close(got + torch.zeros(()), want, rtol=1e-6, atol=0)


def test_transpose_has_the_values_transposed(weight):
    want = weight.dequantize()
    assert weight.t().shape == want.t().shape
    assert_values(weight.t(), want.t())
    assert_values(weight.t().t(), want)


def test_view_and_reshape_have_the_values(fmt, quantized):
    weight = quantized(fmt, (33, 256))
    want = weight.dequantize()
    for shape in [(-1,), (want.shape[0], 2, -1), (1, *want.shape)]:
        assert_values(weight.view(shape), want.view(shape))
        assert_values(weight.reshape(shape), want.reshape(shape))


@pytest.mark.parametrize("op", ["t", "view", "reshape"])
def test_shape_operations_are_exact_in_float16(fmt, gaussian, op):
    """Small weights have scales that float16 cannot hold."""
    weight = fmt.quantize(gaussian(32, 256) * 0.01).to(torch.float16)
    want = weight.dequantize()
    args = () if op == "t" else (-1,)
    got = getattr(weight, op)(*args) + torch.zeros((), dtype=torch.float16)
    assert torch.equal(got, getattr(want, op)(*args))


@pytest.mark.parametrize("op", ["detach", "clone", "contiguous"])
def test_copies_keep_the_layout_and_the_bits(fmt, weight, same_bits, op):
    copy = getattr(weight, op)()
    assert formats.of(copy) is fmt
    assert same_bits(copy.dequantize(), weight.dequantize())


def test_clone_has_memory_of_its_own(weight):
    want = weight.dequantize()
    copy = weight.clone()
    copy._qdata.view(torch.uint8).fill_(0)
    for name in copy._params._tensor_fields():
        getattr(copy._params, name).reshape(-1).view(torch.uint8).fill_(0)
    assert torch.equal(weight.dequantize(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_dtype_changes_the_logical_dtype_alone(fmt, weight, same_bits, dtype):
    moved = weight.to(dtype)
    assert (moved.dtype, moved.dequantize().dtype) == (dtype, dtype)
    assert formats.of(moved) is fmt
    assert same_bits(moved._qdata, weight._qdata)
    assert same_bits(moved.to(torch.float32).dequantize(), weight.dequantize())


def test_copy_into_another_takes_its_values_and_keeps_the_dtype(fmt, weight, gaussian):
    target = fmt.quantize(gaussian(*weight.shape, seed=7)).to(torch.bfloat16)
    target.copy_(weight)
    assert target.dtype == torch.bfloat16
    assert torch.equal(target.to(torch.float32).dequantize(), weight.dequantize())


def test_product_with_the_transpose_is_that_of_the_values(fmt, weight):
    """comfy-kitchen multiplies some formats by its own kernels, which round the activation."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, weight.shape[1], generator=generator)
    want = x @ weight.dequantize().t()
    wrong = ((x @ weight.t() - want).norm() / want.norm()).item()
    assert wrong <= (fmt.max_error if fmt.storage == torch.int8 else 1e-6)


def test_elementwise_arithmetic_is_that_of_the_values(weight):
    want = weight.dequantize()
    torch.testing.assert_close(weight * 2 + 1, want * 2 + 1, **CLOSE)
    torch.testing.assert_close(weight + want, 2 * want, **CLOSE)


def lora(weight: torch.Tensor, size: float) -> torch.Tensor:
    """Return a delta of rank 1 and constant magnitude `size`, spread over the whole weight."""
    generator = torch.Generator().manual_seed(5)
    n, k = weight.shape
    signs = [torch.randint(0, 2, (m,), generator=generator) * 2.0 - 1 for m in (n, k)]
    return size * torch.outer(*signs)


def test_stochastic_rounding_keeps_a_delta_below_half_a_step(fmt, quantized):
    """The LoRA case: what is added is a fifth of the format's own rounding error.

    A uniform error is a step / sqrt(12), so this is far below half a step nearly everywhere. What
    comes back is measured along the delta: 1 is all of it. Its spread follows from the spread of
    the seeds themselves.
    """
    weight = quantized(fmt, (160, 512))
    base = weight.dequantize()
    delta = lora(base, 0.2 * fmt.max_error * base.square().mean().sqrt().item())
    kept = torch.tensor(
        [
            ((again - base) * delta).sum() / delta.square().sum()
            for seed in range(1, 9)
            for again in [requantized(weight, base + delta, seed)]
        ]
    )
    spread = kept.std() / len(kept) ** 0.5
    assert abs(kept.mean() - 1) <= 0.1 + 4 * spread
    assert spread < 0.1


def requantized(weight, values: torch.Tensor, seed: int) -> torch.Tensor:
    again = weight.requantize_from_float(values, scale="recalculate", stochastic_rounding=seed)
    assert again._layout_cls == weight._layout_cls
    assert again.shape == values.shape
    return again.dequantize()


def test_stochastic_rounding_errs_at_most_twice_as_much_as_nearest(fmt, gaussian, quantized):
    """Its variance is at most four times that of nearest: p(1 - p) <= 1/4 against 1/12."""
    values = gaussian(160, 512)
    again = requantized(quantized(fmt, (160, 512)), values, seed=1)
    assert (again - values).norm() <= 2 * fmt.max_error * values.norm()


@pytest.mark.parametrize("seed", [0, None])
def test_no_seed_rounds_to_nearest(fmt, gaussian, quantized, same_bits, seed):
    values = gaussian(33, 256, seed=9)
    codebook = fmt.pack(quantized(fmt, (33, 256))).get("weight_codebook")
    if codebook is not None:
        pytest.skip("requantizing keeps the codebook, which quantizing chooses anew")
    again = quantized(fmt, (33, 256)).requantize_from_float(
        values, scale="recalculate", stochastic_rounding=seed
    )
    assert same_bits(again._qdata, fmt.quantize(values)._qdata)


def test_a_seed_gives_the_same_result_twice(fmt, gaussian, quantized):
    weight, values = quantized(fmt, (33, 256)), gaussian(33, 256, seed=9)
    first, again, other = (requantized(weight, values, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
