"""The format of a model whose user chooses none."""

import pytest
import torch

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


def test_best_is_the_most_exact_of_the_formats_of_8_bits():
    errors = {n: formats.get(n).max_error for n in formats.names() if formats.get(n).bits == 8}
    assert min(errors, key=errors.get) == BEST
