import math

import pytest
import torch
from safetensors.torch import save_file

from lowbit.quant import formats
from lowbit.quant.checkpoint import CheckpointError
from lowbit.quant.checkpoint.stored import marker_tensor
from lowbit.quant.compare import compare, relative_error


def write(path, tensors):
    save_file(tensors, path)
    return str(path)


def test_relative_error_is_the_ratio_of_norms():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert relative_error(a, b) == pytest.approx(0.1)


def test_zero_tensor_is_equal_to_itself_and_infinitely_far_from_others():
    zero = torch.zeros(4)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, torch.ones(4)) == math.inf


def test_pieces_do_not_change_the_error(monkeypatch):
    a, b = torch.randn(100), torch.randn(100)
    whole = relative_error(a, b)
    monkeypatch.setattr("lowbit.quant.compare.CHUNK_ELEMENTS", 7)
    assert relative_error(a, b) == pytest.approx(whole)


@pytest.mark.parametrize("name", formats.names())
def test_quantized_layer_is_compared_as_dequantized(tmp_path, name):
    fmt, weight = formats.get(name), torch.randn(256, 512)
    quantized, error = fmt.quantize_measured(weight)
    parts = {f"blocks.0.ffn.{p}": t for p, t in fmt.pack(quantized).items()}
    parts["blocks.0.ffn.comfy_quant"] = marker_tensor(fmt.marker)
    a = write(tmp_path / "a.safetensors", {"blocks.0.ffn.weight": weight})
    result = compare(a, write(tmp_path / "b.safetensors", parts))
    (difference,) = result.differences
    assert difference.error == pytest.approx(error, rel=1e-4)
    assert difference.formats == ("float32", name) and difference.linear
    assert not result.only_b


def test_nan_and_other_shapes_come_first(tmp_path):
    a = {"x.weight": torch.ones(2, 2), "y.weight": torch.ones(2, 2), "z.weight": torch.ones(2, 2)}
    b = {"x.weight": torch.ones(2, 2) * 1.5, "y.weight": torch.ones(2, 2) * math.nan}
    b["z.weight"] = torch.ones(3, 2)
    first, second, last = compare(
        write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    ).differences
    assert {first.name, second.name} == {"y.weight", "z.weight"}
    assert last.error == 0.5


def test_two_models_with_no_name_in_common_are_refused(tmp_path):
    a = write(tmp_path / "a.safetensors", {"x.weight": torch.ones(2, 2)})
    b = write(tmp_path / "b.safetensors", {"y.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="no tensor in common"):
        compare(a, b)
