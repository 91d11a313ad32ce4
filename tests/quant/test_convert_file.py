"""Faults while a file is converted: whatever happens, the target is whole, absent, or as it was."""

import pytest
import torch
from safetensors.torch import save_file

from lowbit.quant.checkpoint import Checkpoint, CheckpointError, CheckpointWriter
from lowbit.quant.convert_file import convert_file
from tests import foreign

OLD = b"what was there before"
LAYERS = 4
# Behind the header, before most of the data.
CUT_BYTES = 10_000


@pytest.fixture
def source(tmp_path):
    """A file of LightX2V's."""
    tensors = {
        f"blocks.{i}.m.{part}": tensor.contiguous()
        for i in range(LAYERS)
        for part, tensor in foreign.lightx2v(foreign.even(128, 1024, i)).items()
    }
    save_file(tensors, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("after", range(LAYERS))
@pytest.mark.parametrize("old", [False, True])
def test_interrupt_after_any_layer_leaves_the_target_as_it_was(source, after, old):
    target = source.parent / "target.safetensors"
    if old:
        target.write_bytes(OLD)
    before, calls = names(source.parent), []

    def stop(done, total):
        calls.append(done)
        if len(calls) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_file(source, target, overwrite=old, progress=stop)
    assert names(source.parent) == before
    assert not old or target.read_bytes() == OLD


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_full_disk_leaves_the_target_as_it_was(source, monkeypatch, after):
    target = source.parent / "target.safetensors"
    target.write_bytes(OLD)
    before, written = names(source.parent), []
    write = CheckpointWriter._write

    def write_until_full(self, name, tensor):
        written.append(name)
        if len(written) > after:
            with self._reporting():
                raise OSError(28, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "_write", write_until_full)
    with pytest.raises(CheckpointError, match=r"target.safetensors: No space left on device"):
        convert_file(source, target, overwrite=True)
    assert names(source.parent) == before and target.read_bytes() == OLD


def test_source_cut_meanwhile_is_named(source):
    target = source.parent / "target.safetensors"
    with (
        open(source, "r+b") as file,
        pytest.raises(CheckpointError, match="the file ends in the middle"),
    ):
        convert_file(source, target, progress=lambda done, total: file.truncate(CUT_BYTES))
    assert names(source.parent) == ["source.safetensors"]


def test_nothing_to_write_over_without_being_asked(source):
    target = source.parent / "target.safetensors"
    target.write_bytes(OLD)
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert_file(source, target)
    with pytest.raises(CheckpointError, match="same file"):
        convert_file(source, source, overwrite=True)
    assert target.read_bytes() == OLD


def test_result_has_the_sizes_of_both_files(source):
    target = source.parent / "target.safetensors"
    result = convert_file(source, target)
    assert result.source_bytes == Checkpoint(source).size_bytes
    assert result.result_bytes == Checkpoint(target).size_bytes
    assert {r.format for r in result.records} == {"nvfp4"}
    assert torch.equal(
        Checkpoint(target).read("blocks.0.m.weight"),
        foreign.packed("nvfp4", foreign.even(128, 1024, 0))["weight"],
    )
