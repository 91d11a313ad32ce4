import json
import re
import struct
import time
import tracemalloc

import pytest
import torch

from lowbit.quant.checkpoint import CheckpointError
from lowbit.quant.checkpoint.header import (
    ALIGNMENT,
    CODES,
    DTYPES,
    LENGTH_BYTES,
    MAX_DEPTH,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_NAME,
    MAX_VALUES,
    encode_header,
    parse_json,
    read_header,
)


def entry(start: int, end: int, dtype: str = "F32", shape=None) -> dict:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def expect_refused(path: str, reason: str) -> None:
    """Assert that the file is refused, with its path and the reason."""
    with pytest.raises(CheckpointError, match=reason) as error:
        read_header(path)
    assert path in str(error.value)


def test_sound_header_is_read_in_the_order_of_the_offsets(raw_file):
    header = {
        "late": entry(16, 24),
        "empty": entry(16, 16, shape=[0, 3]),
        "__metadata__": {"format": "pt"},
        "early": entry(0, 16, shape=[2, 2]),
    }
    path = raw_file(header, bytes(24))
    tensors, metadata = read_header(path)
    assert list(tensors) == ["early", "empty", "late"]
    assert metadata == {"format": "pt"}
    base = LENGTH_BYTES + len(json.dumps(header))
    early = tensors["early"]
    assert (early.path, early.dtype, early.shape) == (path, torch.float32, (2, 2))
    assert (early.start, early.end, early.size_bytes) == (base, base + 16, 16)


def test_scalar_takes_one_element(raw_file):
    tensors, _ = read_header(raw_file({"a": entry(0, 4, shape=[])}, bytes(4)))
    assert tensors["a"].shape == ()


@pytest.mark.parametrize("metadata", [None, {}])
def test_no_metadata_is_empty_metadata(raw_file, metadata):
    assert read_header(raw_file({"__metadata__": metadata})) == ({}, {})


@pytest.mark.parametrize("size", [0, 1, 7])
def test_file_without_a_length_is_refused(tmp_path, size):
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(size))
    expect_refused(str(path), f"only {size} bytes")


@pytest.mark.parametrize("length", [3, MAX_HEADER_BYTES + 1, 1 << 63, (1 << 64) - 1])
def test_length_beyond_the_file_is_refused(raw_file, length):
    expect_refused(raw_file(b"{}", length=length), f"header claims {length} bytes")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not JSON",
        b"\xff\xfe{}",
        b"[]",
        b'"text"',
        b"3",
        b'{"a": 1',
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"__metadata__": [1]}',
        b'{"__metadata__": "text"}',
        b'{"__metadata__": {"key": 1}}',
        b'{"a": ' + b"[" * 100_000,
    ],
    ids=lambda text: repr(text[:30]),
)
def test_text_that_is_no_header_is_refused(raw_file, text):
    expect_refused(raw_file(text), "malformed")


def test_name_used_twice_is_refused(raw_file):
    one = json.dumps(entry(0, 8))
    expect_refused(raw_file(f'{{"a": {one}, "a": {one}}}'.encode(), bytes(8)), "used twice")


@pytest.mark.parametrize("dtype", ["F4", "f32", "", None, 3, ["F32"], {}])
def test_unknown_dtype_is_named(raw_file, dtype):
    expect_refused(
        raw_file({"a": entry(0, 8, dtype, [2])}, bytes(8)), "tensor a has the unsupported dtype"
    )


@pytest.mark.parametrize(
    "bad",
    [
        entry(0, 8, shape=[3]),
        entry(0, 8, shape=[-2]),
        entry(0, 8, shape=[-1, -2]),
        entry(0, 8, shape=[2.0]),
        entry(0, 8, shape=[True, 2]),
        entry(0, 8, shape=["2"]),
        entry(0, 8, shape=[10**400]),
        entry(0, 8, shape="2"),
        entry(0, 8, shape=2),
        entry(0, 8, shape=None) | {"shape": None},
        entry(8, 0, shape=[2]),
        entry(-8, 0, shape=[2]),
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": "08"},
        {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**400]},
        {"shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
    ],
    ids=lambda bad: str(bad)[:70],
)
def test_malformed_tensor_is_named(raw_file, bad):
    expect_refused(raw_file({"bad": bad}, bytes(8)), "tensor bad")


@pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**63], [2**61, 0], [2**40, 2**40, 0]])
def test_dimensions_that_torch_cannot_count_are_refused(raw_file, shape):
    """Without elements they take no bytes, and torch fails on them only when they are read."""
    expect_refused(raw_file({"a": entry(0, 0, shape=shape)}), r"tensor a has F32 .* can count")


def test_dimensions_that_torch_can_count_are_read(raw_file):
    tensors, _ = read_header(raw_file({"a": entry(0, 0, shape=[2**60, 0])}))
    assert torch.empty(tensors["a"].shape).shape == (2**60, 0)


def test_shape_of_as_many_dimensions_as_allowed_is_read(raw_file):
    tensors, _ = read_header(raw_file({"a": entry(0, 4, shape=[1] * MAX_DIMENSIONS)}, bytes(4)))
    assert tensors["a"].shape == (1,) * MAX_DIMENSIONS


@pytest.mark.parametrize(
    "bad",
    [
        # The product of these, or only that of their first two, takes minutes or all memory.
        entry(0, 0, shape=["ab", 1 << 60]),
        entry(0, 0, shape=[[1], 1 << 60]),
        entry(0, 0, shape=[0] + [10**18] * 300_000),
        entry(0, 0, shape=[999_999_999] * 300_000),
        entry(0, 0, shape=[int("9" * 4200)] * 1000),
        entry(0, 4, shape=[1] * (MAX_DIMENSIONS + 1)),
        # Their message would be as long as they are.
        entry(0, 8, shape=["2" * 100_000]),
        entry(0, 8, "F" * 100_000),
        entry(0, 8, ["F32"] * 100_000),
        entry(0, int("9" * 4200)),
        entry(int("9" * 4200), 8),
        entry(0, 8, shape=[int("9" * 4200)] * 2),
        entry(0, 8) | {"data_offsets": [0] * 100_000},
        entry(0, (1 << 64) - 1, shape=[(1 << 64) - 1] * MAX_DIMENSIONS),
    ],
    ids=lambda bad: str(bad)[:50],
)
def test_tensor_built_to_hurt_is_refused_at_once_and_in_few_words(raw_file, bad):
    path = raw_file({"bad": bad}, bytes(8))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="tensor bad has ") as error:
        read_header(path)
    assert time.perf_counter() - start < 2
    assert len(str(error.value)) < len(path) + 400


def test_name_that_would_fill_every_message_is_refused(raw_file):
    tensors, _ = read_header(raw_file({"n" * MAX_NAME: entry(0, 8)}, bytes(8)))
    assert list(tensors) == ["n" * MAX_NAME]
    path = raw_file({"n" * 10**6: entry(0, 8)}, bytes(8))
    with pytest.raises(CheckpointError, match="it has 1000000 characters") as error:
        read_header(path)
    assert len(str(error.value)) < len(path) + 400


@pytest.mark.parametrize("text", ["{}" + "]" * 10**7, '{"a": [' + "]}" * (5 * 10**6)])
def test_closing_brackets_without_end_take_no_memory(text):
    """They are no JSON from the first one on, and are not looked at."""
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"^a file is malformed, no JSON"):
        parse_json(text, "a file")
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Copies of the text without its strings.
    assert peak < 4 * len(text) and seconds < 1


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 100_000])
def test_json_that_is_nested_too_deep_is_refused_by_name(opening, depth):
    closing = "]" if opening == "[" else "}"
    with pytest.raises(CheckpointError, match=r"^a file: its words is malformed"):
        parse_json(opening * depth + "1" + closing * depth, "a file: its words")


@pytest.mark.parametrize("one", ["[]", "{}", '""', "1", '{"a":1}', '"\\\\"', '"\\""'])
def test_json_of_too_many_values_is_refused_before_it_is_parsed(monkeypatch, one):
    def fail(*args, **kwargs):
        raise AssertionError("it was parsed")

    text = f"[{','.join([one] * (MAX_VALUES + 1))}]"
    monkeypatch.setattr(json, "loads", fail)
    with pytest.raises(
        CheckpointError, match=f"^a file is malformed: it holds more than {MAX_VALUES}"
    ):
        parse_json(text, "a file")


@pytest.mark.parametrize(
    "inner", ["[" * 100, "],[" * 100, '\\"[' * 100, "\\\\", '\\\\\\"[[', ",", "ü[漢"]
)
def test_brackets_in_strings_are_text(inner):
    inner = inner * (1 + MAX_DEPTH)
    text = f'{{"workflow": "{inner}", "{inner}": [{{}}]}}'
    found = parse_json(text, "a file")
    assert found == json.loads(text) and len(found) == 2
    assert parse_json(text.encode(), "a file") == found
    assert parse_json(text.encode("utf-16"), "a file") == found
    with pytest.raises(CheckpointError, match="nested"):
        parse_json(f'{{"{inner}": {"[" * MAX_DEPTH}{"]" * MAX_DEPTH}}}', "a file")


def test_json_of_some_depth_is_read():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "a file")
    assert [parse_json(text, "a file") for text in ("3", '{"a": [{}]}', b"[]")] == [
        3,
        {"a": [{}]},
        [],
    ]


@pytest.mark.parametrize("second", [(4, 12), (0, 8), (12, 20), (9, 17)])
def test_overlap_and_hole_are_refused(raw_file, second):
    header = {"a": entry(0, 8), "b": entry(*second)}
    expect_refused(raw_file(header, bytes(second[1])), "tensor b overlaps another or leaves a hole")


def test_hole_at_the_start_is_refused(raw_file):
    expect_refused(
        raw_file({"a": entry(4, 8)}, bytes(8)), "tensor a overlaps another or leaves a hole"
    )


@pytest.mark.parametrize("size", [0, 7, 9, 100])
def test_truncated_and_padded_files_are_refused(raw_file, size):
    expect_refused(raw_file({"a": entry(0, 8)}, bytes(size)), "truncated or padded")


def test_offsets_of_mixed_kinds_are_refused(raw_file):
    header = {"a": entry(0, 8), "b": entry(0, 8) | {"data_offsets": "ab"}}
    expect_refused(raw_file(header, bytes(8)), "malformed")


def test_missing_file_is_refused(tmp_path):
    expect_refused(str(tmp_path / "none.safetensors"), "No such file")


def test_dtype_codes_are_one_to_one():
    assert {CODES[DTYPES[code]] for code in DTYPES} == set(DTYPES)


@pytest.mark.parametrize("metadata", [{}, {"quote": '"\\', "ü": "漢字"}])
def test_encoded_header_is_read_back_and_aligned(tmp_path, metadata):
    entries = {"ä.weight": (torch.bfloat16, (3, 2), 0, 12), "b": (torch.int8, (), 12, 13)}
    text = encode_header(entries, metadata)
    (length,) = struct.unpack("<Q", text[:LENGTH_BYTES])
    assert length == len(text) - LENGTH_BYTES
    assert length % ALIGNMENT == 0
    path = tmp_path / "a.safetensors"
    path.write_bytes(text + bytes(13))
    tensors, found = read_header(str(path))
    assert found == metadata
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == {
        n: e[:2] for n, e in entries.items()
    }


def test_header_fills_the_room_kept_for_it():
    assert len(encode_header({}, {}, 4000)) == LENGTH_BYTES + 4000


def test_room_too_small_is_an_internal_error():
    with pytest.raises(AssertionError, match=re.escape("the space kept for the header")):
        encode_header({"a": (torch.int8, (1,), 0, 1)}, {}, 10)
