"""Every format, and weights to try it on."""

import functools

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.quant import formats


@pytest.fixture(params=formats.names())
def fmt(request) -> formats.Format:
    return formats.get(request.param)


@pytest.fixture(scope="session")
def gaussian():
    """A function (n, k, dtype, seed) -> weight ~ N(0, 0.02²), the size of trained weights."""

    def make(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(n, k, generator=generator) * 0.02).to(dtype)

    return make


@pytest.fixture(scope="session")
def quantized(gaussian):
    """A function (format, shape) -> a gaussian weight, quantized once; copy before changing it."""

    @functools.cache
    def by_name(name: str, shape: tuple[int, int]) -> QuantizedTensor:
        return formats.get(name).quantize(gaussian(*shape))

    return lambda fmt, shape: by_name(fmt.name, tuple(shape))


@pytest.fixture(scope="session")
def same_bits():
    """A function that says whether two tensors have the same dtype, shape and bytes."""

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        return torch.equal(a, b)

    return same
