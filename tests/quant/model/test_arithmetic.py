"""In which arithmetic 4-bit layers are multiplied, said when a model is quantized or loaded."""

import pytest
import torch

import lowbit
from lowbit.ops.linear.arithmetic import arithmetic_of
from lowbit.ops.linear.modules import LowBitLinear
from lowbit.ops.registry import NoBackendError
from lowbit.quant.model import quantize
from tests.quant.model.conftest import only_wan


def wishes(model) -> set[str]:
    return {arithmetic_of(m.weight) for m in model.modules() if isinstance(m, LowBitLinear)}


@pytest.fixture
def anywhere(monkeypatch):
    """Every arithmetic can run, as on a GPU."""
    monkeypatch.setattr(quantize, "check_arithmetic", lambda *arguments: None)


@only_wan
def test_wish_is_of_the_model_and_not_of_the_file(model, tmp_path, anywhere):
    done = lowbit.quantize_model(model, "nvfp4", arithmetic="w4a16")
    assert wishes(model) == {"w4a16"} and {r.format for r in done.records} == {"nvfp4", None}
    path = lowbit.save_model(model, tmp_path / "model.safetensors")
    assert wishes(lowbit.load_model(path)) == {"auto"}
    again = lowbit.load_model(path, dtype=torch.float32, arithmetic="w4a8")
    assert wishes(again) == {"w4a8"}
    pairs = zip(model.state_dict().items(), again.state_dict().values(), strict=True)
    for (name, one), other in pairs:
        assert torch.equal(one + 0, other + 0), name


@only_wan
def test_wishes_that_cannot_be_are_refused_first(model, tmp_path):
    before = {name: type(module) for name, module in model.named_modules()}
    for fmt, arithmetic, error, words in (
        ("int8", "w4a16", ValueError, "not for int8"),
        ("nvfp4", "fast", ValueError, "'fast'"),
    ):
        with pytest.raises(error, match=words):
            lowbit.quantize_model(model, fmt, arithmetic=arithmetic)
    if not torch.cuda.is_available():
        with pytest.raises(NoBackendError):
            lowbit.quantize_model(model, "nvfp4", arithmetic="w4a8")
    assert {name: type(module) for name, module in model.named_modules()} == before
    lowbit.quantize_model(model, "int8")
    path = lowbit.save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="arithmetic w4a8: the file has no layers of"):
        lowbit.load_model(path, arithmetic="w4a8")
    with pytest.raises(ValueError, match="'fast'"):
        lowbit.load_model(path, arithmetic="fast")
