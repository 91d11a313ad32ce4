"""A device that runs out of memory: once more after making room, then the CPU, and it is said."""

import dataclasses

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.quant import formats
from lowbit.quant.checkpoint import Checkpoint
from lowbit.quant.convert import plan, stream
from lowbit.quant.formats import Format
from lowbit.quant.memory import quantize_within_memory
from lowbit.quant.model import quantize_model
from tests.checkpoints import write_wan

WEIGHT = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
FORMATS = ("int8_convrot", "nvfp4")


@pytest.fixture
def device(monkeypatch):
    """A function failures -> device: it has no memory for so many layers; then it is the CPU."""
    meta, real = torch.device("meta"), Format.quantize_measured
    left = []

    def quantize_measured(self, weight, tick=lambda: None):
        if weight.device != meta:
            return real(self, weight, tick)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, WEIGHT, tick)

    def set_up(failures):
        left[:] = [failures]
        return meta

    monkeypatch.setattr(Format, "quantize_measured", quantize_measured)
    return set_up


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("failures", "rooms"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_layer_is_quantized_whatever_the_memory(device, name, failures, rooms, caplog):
    made, fmt = [], formats.get(name)
    got, error, note = quantize_within_memory(
        fmt, WEIGHT, device(failures), make_room=lambda: made.append(1)
    )
    want, want_error = fmt.quantize_measured(WEIGHT)
    assert torch.equal(got._qdata, want._qdata) and error == want_error
    assert len(made) == rooms
    assert bool(note) == (failures > 1)
    assert ("on the CPU, as the memory of meta ran out" in caplog.text) == (failures > 1)


def test_cpu_without_memory_is_an_error(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Format, "quantize_measured", fail)
    with pytest.raises(torch.OutOfMemoryError):
        quantize_within_memory(formats.get("int8"), WEIGHT, "cpu")


@pytest.fixture
def home(monkeypatch):
    """A function failures -> device: so many times it has no room for a quantized layer."""
    real, left = QuantizedTensor.to, []

    def to(self, *args, **kwargs):
        if args != (torch.device("meta"),):
            return real(self, *args, **kwargs)
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self

    def set_up(failures):
        left[:] = [failures]
        return torch.device("meta")

    monkeypatch.setattr(QuantizedTensor, "to", to)
    return set_up


def test_way_back_of_a_layer_is_tried_again_after_making_room(home):
    made, fmt = [], formats.get("int8")
    got, error, note = quantize_within_memory(
        fmt, WEIGHT, "cpu", make_room=lambda: made.append(1), home=home(1)
    )
    assert torch.equal(got._qdata, fmt.quantize(WEIGHT)._qdata)
    assert (made, note) == ([1], "") and error > 0


def test_way_back_without_memory_is_an_error(home):
    made = []
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        quantize_within_memory(
            formats.get("int8"), WEIGHT, "cpu", make_room=lambda: made.append(1), home=home(9)
        )
    assert made == [1]


def test_model_whose_device_has_no_memory_names_the_layer_and_stays(monkeypatch):
    """The layer comes back to the device of the model within the fallback."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 64))
    before, tries = model[0], []

    def to(self, *args, **kwargs):
        tries.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(QuantizedTensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError, match=r"layer 0: cpu has no memory .*out of memory"):
        quantize_model(model, "int8", "none")
    assert model[0] is before and len(tries) == 2


def test_interrupt_is_no_lack_of_memory(device):
    class StopError(Exception):
        pass

    def tick():
        raise StopError

    with pytest.raises(StopError):
        quantize_within_memory(formats.get("int8"), WEIGHT, "cpu", tick)


def test_file_is_quantized_and_it_is_said_once(device, tmp_path):
    path = write_wan(tmp_path / "wan.safetensors", layers=1)
    want = plan(Checkpoint(path), "int8_convrot")
    expected = dict(stream(want))
    work = plan(Checkpoint(path), "int8_convrot")
    got = dict(stream(work, device(1000)))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert [dataclasses.astuple(r) for r in work.records] == [
        dataclasses.astuple(r) for r in want.records
    ]
    (note,) = work.notes
    first = work.layers[0].layer
    assert (
        note == f"{first}, and perhaps others: quantized on the CPU, as the memory of meta ran out"
    )


def test_model_of_python_is_quantized_and_it_is_said(device, caplog):
    """Its layers have the weight that the device above stands for."""
    layers = [torch.nn.Linear(256, 64, bias=False) for _ in range(2)]
    for layer in layers:
        layer.weight.data.copy_(WEIGHT)
    model = torch.nn.Sequential(*layers)
    quantize_model(model, "int8", "none", device=device(1000))
    want = formats.get("int8").quantize(WEIGHT)
    assert all(torch.equal(layer.weight._qdata, want._qdata) for layer in model)
    assert caplog.text.count("quantized on the CPU, as the memory of meta ran out") == 2
