"""The format of a model whose user chooses none."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.quant import formats
from lowbit.quant.best import BEST, best_format
from lowbit.quant.checkpoint import Checkpoint
from lowbit.quant.quantize_file import quantize_file
from tests.checkpoints import write_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors", layers=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_file_that_is_not_quantized_is_quantized(tmp_path, dtype):
    path = write_wan(tmp_path / "wan.safetensors", layers=1, dtype=dtype)
    assert best_format(Checkpoint(path)) == BEST


@pytest.mark.parametrize("name", formats.names())
def test_file_that_is_quantized_stays_as_it_is(wan, tmp_path, name):
    target = tmp_path / "quantized.safetensors"
    quantize_file(wan, target, name)
    assert best_format(Checkpoint(target)) is None


def in_dtype(source, target, dtype, only=""):
    """Write the matrices of `source` whose names hold `only` in `dtype`, without scales."""
    tensors = load_file(source)
    chosen = {n: t.to(dtype) for n, t in tensors.items() if t.dim() == 2 and only in n}
    save_file(tensors | chosen, target)
    return Checkpoint(target)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales_stays_as_it_is(wan, tmp_path, dtype):
    assert best_format(in_dtype(wan, tmp_path / "fp8.safetensors", dtype)) is None


def test_some_fp8_in_a_file_of_16_bits_is_quantized(wan, tmp_path):
    source = in_dtype(wan, tmp_path / "some.safetensors", torch.float8_e4m3fn, "ffn.0.weight")
    assert best_format(source) == BEST


def test_fp8_of_another_model_in_the_file_does_not_count(wan, tmp_path):
    prefix = "model.diffusion_model."
    tensors = {prefix + name: tensor for name, tensor in load_file(wan).items()}
    other = torch.zeros(4096, 4096, dtype=torch.float8_e4m3fn)
    path = tmp_path / "whole.safetensors"
    save_file(tensors | {"text_encoders.t5.weight": other}, path)
    assert best_format(Checkpoint(path)) == BEST


def test_best_is_the_most_exact_of_the_formats_of_8_bits():
    errors = {n: formats.get(n).max_error for n in formats.names() if formats.get(n).bits == 8}
    assert min(errors, key=errors.get) == BEST
