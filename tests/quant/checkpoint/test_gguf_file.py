"""GGUF files: every kind of block is read as gguf reads it, broken files are refused by name."""

import struct
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

from lowbit.quant.checkpoint import CheckpointError, gguf_file, open_checkpoint
from lowbit.quant.checkpoint.gguf_header import check_header
from tests import gguf_files

WEIGHT = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
# Relative RMS of rounding to so many levels, uniform: half a step in a block's range, at most.
LEVELS = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 8, "Q5_0": 16, "Q5_1": 16, "BF16": 256}


def written(path, kind="Q8_0", **more):
    return gguf_files.write(path / "model.gguf", {"m.weight": WEIGHT, **more}, kind)


@pytest.mark.parametrize("kind", [*gguf_files.WRITTEN, *gguf_files.RANDOM])
@pytest.mark.parametrize("chunk", [512, 1 << 20])
def test_blocks_are_read_as_gguf_reads_them(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", chunk)
    path = written(tmp_path, kind)
    (tensor,) = gguf.GGUFReader(path).tensors
    want = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    checkpoint = open_checkpoint(path)
    info = checkpoint["m.weight"]
    got = checkpoint.read("m.weight")
    assert info.shape == got.shape == (64, 512)
    assert torch.equal(got.float(), want)
    assert (info.dtype, info.encoding) == (
        (torch.bfloat16, "") if kind == "BF16" else (torch.float32, kind)
    )
    assert info.size_bytes == tensor.n_bytes


@pytest.mark.parametrize("kind", gguf_files.WRITTEN)
def test_values_are_those_that_were_written(tmp_path, kind):
    """Not only what gguf says: the way there and back loses no more than its levels allow."""
    got = open_checkpoint(written(tmp_path, kind)).read("m.weight").float()
    blocks, errors = WEIGHT.reshape(-1, 32), (got - WEIGHT).reshape(-1, 32)
    step = blocks.abs().amax(1) * 2 / LEVELS[kind]
    assert (errors.abs().amax(1) <= step).all()


def test_reading_takes_the_memory_of_a_piece_not_of_the_tensor(tmp_path):
    """Of numpy's, in which the blocks are decoded; the result itself is torch's."""
    weight = torch.zeros(4096, 2048)
    checkpoint = open_checkpoint(written(tmp_path, **{"large.weight": weight}))
    tracemalloc.start()
    checkpoint.read("large.weight")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Blocks, codes, values and their product.
    assert 0 < peak < 6 * gguf_file.CHUNK_ELEMENTS * torch.float32.itemsize < weight.nbytes


def test_shape_of_reshaped_and_five_dimensional_tensors_comes_back(tmp_path):
    patch = torch.randn(32, 16, 1, 2, 2)
    more = {"narrow.weight": torch.randn(64, 64), "patch_embedding.weight": patch}
    checkpoint = open_checkpoint(written(tmp_path, **more))
    assert checkpoint["narrow.weight"].shape == (64, 64)
    assert checkpoint.read("narrow.weight").shape == (64, 64)
    assert torch.equal(checkpoint.read("patch_embedding.weight"), patch)


# llama.cpp keeps activations in these, never weights; gguf has no arithmetic for them.
@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K"])
def test_blocks_that_gguf_cannot_read_are_refused_by_name_when_the_file_is_opened(tmp_path, kind):
    block_type = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[block_type]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    blocks = np.zeros((4, WEIGHT.shape[1] // elements * size), dtype=np.uint8)
    writer.add_tensor("m.weight", blocks, raw_dtype=block_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = rf"m\.gguf: m\.weight is in blocks of {kind}, which the installed gguf has no"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_file_of_a_text_model_is_refused(tmp_path):
    path = written(tmp_path, **{"blk.0.attn_q.weight": WEIGHT})
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight is of a text model"):
        open_checkpoint(path)


def test_file_to_which_the_last_step_was_not_done_is_refused(tmp_path):
    path = written(tmp_path, **{"patch_embedding.bias": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"patch_embedding.weight is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.99])
def test_truncated_file_is_refused(tmp_path, share):
    path = written(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="truncated") as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_file_cut_after_opening_is_noticed(tmp_path):
    path = written(tmp_path)
    checkpoint = open_checkpoint(path)
    with open(path, "r+b") as file:
        file.truncate(checkpoint["m.weight"].end - 1)
    with pytest.raises(CheckpointError, match=r"reading m\.weight: the file ends in the middle"):
        checkpoint.read("m.weight")


@pytest.mark.parametrize("at", range(0, 200, 7))
def test_damaged_header_is_refused_or_read_as_something(tmp_path, at):
    """Whatever a byte of the header says, nothing but a CheckpointError comes of it."""
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            checkpoint.read(name)
    except CheckpointError as error:
        assert str(path) in str(error)


def text(content: bytes, length=None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def a_list(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


BYTE, STRING, LIST = 0, 8, 9
EMPTY = a_list(BYTE, 0)
NESTED = a_list(LIST, 1) * 5000 + EMPTY
HOSTILE = {
    "a list of 2^60": ({"value": a_list(4, 1 << 60)}, "tells of 1152921504606846976 values"),
    "a list of strings": ({"value": a_list(STRING, 3, text(b"", 1 << 50))}, "goes on for"),
    "lists in lists": ({"value": NESTED}, "nested more than 8 deep"),
    "many values": ({"value": a_list(BYTE, 10**6, bytes(10**6))}, "holds more than 131072 values"),
    "many strings": ({"value": a_list(STRING, 10**6, text(b"") * 10**6)}, "holds more than"),
    "many dimensions": ({"dimensions": (1 << 32) - 1}, "tells of 4294967295 values"),
    "more dimensions": ({"dimensions": 9, "sizes": [1 << 62] * 9}, "a tensor of 9 dimensions"),
    "a long key": ({"key": text(b"k", 1 << 62)}, "goes on for 4611686018427387904 bytes"),
    "a key to read": ({"key": text(b"k" * 10**6)}, "a name of 1000000 bytes"),
    "a tensor's name": ({"name": b"m" * 10**6}, "a name of 1000000 bytes"),
    "an unknown type": ({"kind": 99, "value": b""}, "unknown type 99"),
    "many fields": ({"fields": 1 << 60}, "tells of 1152921504606846976 values"),
    "many tensors": ({"tensors": 1 << 60}, "tells of 1152921504606846976 values"),
}


def header_of(
    tensors=1,
    fields=1,
    key=None,
    kind=LIST,
    value=EMPTY,
    name=b"m.weight",
    dimensions=1,
    sizes=(32,),
) -> bytes:
    """A GGUF file with one list in its header, and one tensor of 32 numbers."""
    data = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)
    data += (key or text(b"some.key")) + struct.pack("<I", kind) + value
    data += text(name) + struct.pack(f"<I{len(sizes)}QIQ", dimensions, *sizes, 0, 0)
    return data + bytes(-len(data) % 32 + 32 * 4)


@pytest.mark.parametrize("what", HOSTILE)
def test_header_built_to_hurt_is_refused_before_gguf_reads_it(tmp_path, monkeypatch, what):
    def fail(path):
        raise AssertionError("gguf read it")

    monkeypatch.setattr(gguf, "GGUFReader", fail)
    parts, message = HOSTILE[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(header_of(**parts))
    with pytest.raises(CheckpointError, match=f"m.gguf: .*{message}") as error:
        open_checkpoint(path)
    assert len(str(error.value)) < len(str(path)) + 400


@pytest.mark.parametrize("value", [a_list(STRING, 2, text(b"a") + text(b"bc")), a_list(BYTE, 0)])
@pytest.mark.parametrize("more", [b"", a_list(LIST, 1)])
def test_lists_of_any_kind_are_read_over(tmp_path, value, more):
    path = tmp_path / "m.gguf"
    path.write_bytes(header_of(value=more + value))
    assert open_checkpoint(path)["m.weight"].shape == (32,)


def test_file_of_the_other_byte_order_is_told(tmp_path):
    """Its header is sound; the package or the size of its tensors decides about the rest."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "wan", endianess=gguf.GGUFEndian.BIG)
    writer.add_array("a.list", ["one", "two"])
    writer.add_tensor("m.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_header(str(path))
    data = path.read_bytes()
    path.write_bytes(data[:60])
    with pytest.raises(ValueError, match="are left"):
        check_header(str(path))


def test_shape_that_the_blocks_do_not_fill_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "BLOCK", 32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    writer.add_array("comfy.gguf.orig_shape.m", [3, 5])
    writer.add_tensor("m", WEIGHT.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"was never \[3, 5\]"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "sizes", [[1 << 62] * 20_000, [0] + [1 << 62] * 20_000, [1] * 8 + [32]], ids=len
)
def test_true_shape_of_many_dimensions_is_refused_before_it_is_counted(tmp_path, sizes):
    path = tmp_path / "m.gguf"
    value = a_list(10, len(sizes), struct.pack(f"<{len(sizes)}Q", *sizes))
    path.write_bytes(header_of(key=text(b"comfy.gguf.orig_shape.m.weight"), value=value))
    message = f"m.weight was never of {len(sizes)} dimensions"
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(path)
    assert len(str(error.value)) < len(str(path)) + 400


def test_true_shape_of_as_many_dimensions_as_allowed_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    value = a_list(4, 8, struct.pack("<8I", *[1] * 7, 32))
    path.write_bytes(header_of(key=text(b"comfy.gguf.orig_shape.m.weight"), value=value))
    assert open_checkpoint(path)["m.weight"].shape == (1,) * 7 + (32,)


def laid_out(*tensors: tuple[int, int], data_bytes: int) -> bytes:
    """A GGUF file of tensors of numbers, each with (how many, where in the data)."""
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0)
    for i, (size, offset) in enumerate(tensors):
        data += text(b"m%d.weight" % i) + struct.pack("<IQIQ", 1, size, 0, offset)
    return data + bytes(-len(data) % 32 + data_bytes)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ([(32, 0)] * 1000, "m1.weight"),
        ([(32, 0), (32, 96)], "m1.weight"),
        ([(32, 64), (32, 0)], "m0.weight"),
        ([(8, 32), (32, 0)], "m0.weight"),
        # Counted from the data, it wraps round to the header.
        ([(32, (1 << 64) - 64), (32, 64)], "m0.weight"),
    ],
    ids=["all in one place", "by a block", "in another order", "within", "the header"],
)
def test_tensors_that_overlap_each_other_or_the_header_are_refused(tmp_path, tensors, name):
    path = tmp_path / "m.gguf"
    path.write_bytes(laid_out(*tensors, data_bytes=256))
    with pytest.raises(CheckpointError, match=rf"m\.gguf: malformed: {name} begins at byte"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "tensors",
    [
        [(32, 0), (0, 128), (0, 128), (32, 128)],
        [(0, 0), (32, 0), (0, 128)],
        [(32, 128), (16, 0)],
        [(16, 32), (32, 128)],
    ],
    ids=["empty ones", "empty ones at the ends", "in another order", "gaps"],
)
def test_tensors_may_be_empty_in_any_order_and_apart(tmp_path, tensors):
    path = tmp_path / "m.gguf"
    path.write_bytes(laid_out(*tensors, data_bytes=256))
    checkpoint = open_checkpoint(path)
    assert {name: checkpoint.read(name).numel() for name in checkpoint} == {
        f"m{i}.weight": size for i, (size, _) in enumerate(tensors)
    }


def test_missing_package_is_named(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "gguf")
    with pytest.raises(CheckpointError, match="pip install gguf"):
        open_checkpoint(path)
