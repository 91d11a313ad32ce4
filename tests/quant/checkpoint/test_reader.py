import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.quant.checkpoint import Checkpoint, CheckpointError

A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.int8)


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards and their index, as diffusers writes them."""
    save_file({"a": A}, tmp_path / "model-1.safetensors", {"format": "pt", "from": "1"})
    save_file({"b": B}, tmp_path / "model-2.safetensors", {"format": "pt", "to": "2"})
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return tmp_path


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
    return folder / name


def expect_refused(path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        Checkpoint(path)
    assert str(path) in str(error.value)


def test_file_is_a_mapping_of_its_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": A, "b": B}, path, {"key": "text"})
    checkpoint = Checkpoint(path)
    assert (len(checkpoint), set(checkpoint)) == (2, {"a", "b"})
    assert "a" in checkpoint
    assert checkpoint["a"].shape == (2, 3)
    assert checkpoint.metadata == {"key": "text"}
    assert checkpoint.size_bytes == A.nbytes + B.nbytes
    assert torch.equal(checkpoint.read("a"), A)
    assert torch.equal(checkpoint.read("b"), B)
    with pytest.raises(KeyError):
        checkpoint.read("c")


@pytest.mark.parametrize("suffix", [".safetensors", ".sft"])
def test_both_suffixes_are_known(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_file({"a": A}, path)
    assert list(Checkpoint(path)) == ["a"]


def test_what_is_read_may_be_written_to(tmp_path):
    """It is a copy: neither the file nor a second reading changes."""
    path = tmp_path / "a.safetensors"
    save_file({"a": A}, path)
    checkpoint = Checkpoint(path)
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), A)


@pytest.mark.parametrize("of", ["folder", "index"])
def test_shards_are_read_through_their_index(sharded, of):
    checkpoint = Checkpoint(sharded / "model.safetensors.index.json" if of == "index" else sharded)
    assert torch.equal(checkpoint.read("a"), A)
    assert torch.equal(checkpoint.read("b"), B)
    assert checkpoint.metadata == {"format": "pt", "from": "1", "to": "2"}


def test_files_that_the_index_does_not_name_are_left_alone(sharded):
    save_file({"c": A}, sharded / "other.safetensors")
    assert set(Checkpoint(sharded)) == {"a", "b"}


def test_folder_with_one_file_needs_no_index(tmp_path):
    save_file({"a": A}, tmp_path / "only.safetensors")
    assert list(Checkpoint(tmp_path)) == ["a"]


def test_missing_shard_is_named(sharded):
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-2.safetensors is missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", 3, None, True],
)
def test_shard_outside_the_folder_is_refused(sharded, name):
    save_file({"s": A}, sharded.parent / "secret.safetensors")
    write_index(sharded, {"a": name})
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "3",
        '{"weight_map": []}',
        '{"weight_map": {"a": []}}',
        "\udcff",
        "[" * 100_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_malformed_index_is_refused(sharded, text):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    expect_refused(index, "not a readable index")


def test_tensor_in_two_shards_is_named(sharded):
    save_file({"a": A}, sharded / "model-2.safetensors")
    expect_refused(sharded, "a is in two shards")


def test_truncated_shard_is_named(sharded):
    shard = sharded / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: truncated"):
        Checkpoint(sharded)


def test_two_indexes_are_ambiguous(sharded):
    write_index(sharded, {"a": "model-1.safetensors"}, "other.safetensors.index.json")
    expect_refused(sharded, "found 2 and 2 safetensors files")


def test_several_files_without_an_index_are_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    expect_refused(sharded, "found 0 and 2 safetensors files")


def test_empty_folder_and_other_suffixes_are_refused(tmp_path):
    expect_refused(tmp_path, "found 0 and 0")
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    expect_refused(tmp_path / "model.ckpt", r"not a .safetensors file")
    expect_refused(tmp_path / "lora.gguf", r"GGUF is read of diffusion models only")


def test_file_without_tensors_is_refused(raw_file):
    expect_refused(raw_file({"__metadata__": {"a": "b"}}), "holds no tensors")


def test_missing_file_is_named(tmp_path):
    expect_refused(tmp_path / "none.safetensors", "No such file")


def test_file_cut_after_opening_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": A}, path)
    checkpoint = Checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="reading a: the file ends in the middle") as error:
        checkpoint.read("a")
    assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"reading a: .*No such file"):
        checkpoint.read("a")
