"""The safetensors header: 8 bytes of length, then JSON of name → dtype, shape, data_offsets.

`parse_json` reads every other JSON of a checkpoint too.
Source: the safetensors format description (offsets are relative to the end of the header, tensors
lie without holes or overlaps).
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
ALIGNMENT = 8
# The one name that is no tensor's.
METADATA = "__metadata__"
# Lists and objects within one another. No checkpoint has ten; Python's stack ends near a thousand.
MAX_DEPTH = 64
BRACKETS = re.compile(r"[\[\]{}]")
# Strings, and items of lists and objects. A tensor takes fourteen; models have some ten thousand.
MAX_VALUES = 1 << 22
# Of a tensor's shape. Weights have five at most; a product of a million takes minutes.
MAX_DIMENSIONS = 8
# Characters of a tensor's name, which messages show. The longest of a model has some hundred.
MAX_NAME = 1024
# Of dtypes in messages.
SHOWN = 40
# Offsets and sizes are numbers of 64 bits.
MAX_NUMBER = (1 << 64) - 1
# torch counts elements and bytes in 64 bits, zero dimensions as ones.
MAX_BYTES = torch.iinfo(torch.int64).max

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file and the cause."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` and `end` are byte offsets in `path`.

    encoding: of blocks that reading turns into `dtype`; "" where the file holds `dtype` itself.
    """

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    encoding: str = ""

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def parse_json(
    text: str | bytes, where: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return what JSON that came from a file says.

    where: the file and the place in it, for the message. pairs: makes an object of its (name,
    value) pairs, as json's `object_pairs_hook`; may raise ValueError. Raises CheckpointError for
    what is no JSON, and before it is parsed for what is nested more than `MAX_DEPTH` deep or holds
    more than `MAX_VALUES`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        problem = _too_much(text)
        if problem is None:
            return json.loads(text, object_pairs_hook=pairs)
    except ValueError as error:
        raise CheckpointError(f"{where} is malformed, no JSON: {error}") from error
    raise CheckpointError(f"{where} is malformed: {problem}")


def _too_much(text: str) -> str | None:
    """Return what in JSON takes more memory than its text by far, or more stack, else None."""
    # Without quotes that are characters of a string, every second piece lies outside of strings.
    text = text.replace(r"\\", "").replace(r"\"", "")
    strings = text.count('"') // 2
    if strings > MAX_VALUES:
        return f"it holds more than {MAX_VALUES} values"
    text = "".join(text.split('"')[::2])
    if strings + sum(map(text.count, ",[{")) > MAX_VALUES:
        return f"it holds more than {MAX_VALUES} values"
    depth = 0
    for bracket in BRACKETS.finditer(text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            return f"nested more than {MAX_DEPTH} deep"
        if depth < 0:
            # No JSON: its parser stops here, or before, however many follow.
            return None
    return None


def read_header(path: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return (tensors by name in the order of their offsets, metadata) of a safetensors file.

    Raises CheckpointError when the file is missing, truncated or malformed.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            return _parse(path, size, file)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _parse(path: str, size: int, file) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if size < LENGTH_BYTES:
        raise CheckpointError(f"{path}: not a safetensors file, it has only {size} bytes")
    (length,) = struct.unpack("<Q", file.read(LENGTH_BYTES))
    if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise CheckpointError(
            f"{path}: not a safetensors file, or truncated: its header claims {length} bytes, the "
            f"file has {size}"
        )
    try:
        header = parse_json(file.read(length), f"{path}: the safetensors header", _unique)
        metadata = header.pop(METADATA, None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata that is not text")
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is malformed: {error}") from error
    base = LENGTH_BYTES + length
    infos = {name: _info(path, name, entry, base) for name, entry in header.items()}
    tensors = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    expected = 0
    for name, info in tensors.items():
        if info.start - base != expected:
            raise CheckpointError(f"{path}: tensor {name} overlaps another or leaves a hole")
        expected = info.end - base
    if base + expected != size:
        raise CheckpointError(
            f"{path}: truncated or padded: the tensors end at byte {base + expected}, the file has "
            f"{size}"
        )
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is used twice")
    return found


def _info(path: str, name: str, entry: Mapping, base: int) -> TensorInfo:
    """Return where a tensor lies; `base`: the byte at which offsets begin.

    Types and numbers of values are checked before anything is counted or shown: a product takes
    no time, and the CheckpointErrors stay short, whatever the file holds.
    """
    if len(name) > MAX_NAME:
        raise CheckpointError(
            f"{path}: a tensor's name is malformed: it has {len(name)} characters, at most "
            f"{MAX_NAME} are read: {name[:SHOWN]}…"
        )
    where = f"{path}: tensor {name}"
    try:
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where} has a malformed header: {error}") from error
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{where} has the unsupported dtype {code!r:.{SHOWN}}")
    if not (_are_numbers(shape, MAX_DIMENSIONS) and _are_numbers(offsets, 2) and len(offsets) == 2):
        raise CheckpointError(
            f"{where} has a malformed header: a shape is a list of at most {MAX_DIMENSIONS} whole "
            "numbers, data_offsets one of two, each of 64 bits"
        )
    start, end = offsets
    itemsize = DTYPES[code].itemsize
    if end - start != math.prod(shape) * itemsize:
        raise CheckpointError(f"{where} has {code} {shape} but offsets {start} to {end}")
    if math.prod(max(size, 1) for size in shape) > MAX_BYTES // itemsize:
        raise CheckpointError(
            f"{where} has {code} {shape}, more than torch can count; the file is malformed, fetch "
            "it again"
        )
    return TensorInfo(path, DTYPES[code], tuple(shape), base + start, base + end)


def _are_numbers(values: Any, most: int) -> bool:
    """Return whether `values` is a list of at most `most` whole numbers of 64 bits."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value <= MAX_NUMBER for value in values)
    )


def encode_header(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...], int, int]],
    metadata: Mapping[str, str],
    length: int | None = None,
) -> bytes:
    """Return length and JSON of a header; entries: name → (dtype, shape, start, end).

    length: bytes of JSON to fill with trailing spaces, at least what the JSON takes; None: the
    next multiple of 8.
    """
    header = {
        name: {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        for name, (dtype, shape, start, end) in entries.items()
    }
    if metadata:
        header = {METADATA: dict(metadata), **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    if length is None:
        length = -(-len(text) // ALIGNMENT) * ALIGNMENT
    assert len(text) <= length, "the space kept for the header is too small"
    return struct.pack("<Q", length) + text.ljust(length)
