"""Whether the header of a GGUF file can be read at all, before the package `gguf` reads it.

That package makes an object of every value, goes on behind the end of the file, and calls itself
for lists within lists: a file of a kilobyte could keep it busy for ever.
Source: the GGUF format description, versions 2 and 3.
"""

import os
import struct

from .header import MAX_DIMENSIONS, MAX_NAME, CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Bytes of a value by its type's number; strings and lists say their own.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, LIST = 8, 9
# Fields, tensors, their dimensions and the values of lists, together. A diffusion model has some
# thousands, the vocabulary of a text model several times as many as this.
MAX_VALUES = 1 << 17
# Lists within one another. Nobody writes one in another.
MAX_DEPTH = 8


def check_header(path: str) -> None:
    """Return if the header of a GGUF file ends within the file and holds what can be read.

    What has another magic number or version is left to the reader. Raises ValueError for what is
    malformed, CheckpointError for more values than `MAX_VALUES`, OSError when it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8 or start[:4] != MAGIC:
            return
        # Written on a machine of the other byte order, a version has its low bytes in front.
        order = ">" if start[4:6] == b"\0\0" else "<"
        if struct.unpack(f"{order}4xI", start)[0] in VERSIONS:
            _Header(path, file, order).walk()


class _Header:
    """The place in a header up to which it is sound, and how much it may still hold."""

    def __init__(self, path: str, file, order: str):
        self.path = path
        self.file = file
        self.order = order
        self.left_bytes = os.fstat(file.fileno()).st_size - file.tell()
        self.left_values = MAX_VALUES

    def walk(self) -> None:
        """Go to its end. Raises as `check_header`."""
        tensors, fields = self._number("Q"), self._number("Q")
        for _ in self._counted(fields):
            self._name()
            self._value(self._number("I"), 0)
        for _ in self._counted(tensors):
            self._name()
            dimensions = self._number("I")
            self._skip(len(self._counted(dimensions)) * 8 + 4 + 8)
            if dimensions > MAX_DIMENSIONS:
                raise ValueError(
                    f"a tensor of {dimensions} dimensions, at most {MAX_DIMENSIONS} are read"
                )

    def _value(self, kind: int, depth: int) -> None:
        if kind in SIZES:
            self._skip(SIZES[kind])
        elif kind == STRING:
            self._text()
        elif kind == LIST:
            self._list(depth + 1)
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def _list(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"lists are nested more than {MAX_DEPTH} deep")
        kind, count = self._number("I"), self._number("Q")
        values = self._counted(count)
        if kind in SIZES:
            self._skip(count * SIZES[kind])
            return
        for _ in values:
            self._value(kind, depth)

    def _counted(self, count: int) -> range:
        """Return a loop over `count` values, which take a byte at least each."""
        if count > self.left_bytes:
            raise ValueError(f"it tells of {count} values, {self.left_bytes} bytes are left")
        self.left_values -= count
        if self.left_values < 0:
            raise CheckpointError(
                f"{self.path}: its header holds more than {MAX_VALUES} values, as the vocabulary "
                "of a text model does, but no diffusion model; fetch the file again, or another one"
            )
        return range(count)

    def _name(self) -> None:
        length = self._text()
        if length > MAX_NAME:
            raise ValueError(f"a name of {length} bytes, at most {MAX_NAME} are read")

    def _text(self) -> int:
        """Go over a text and return its length in bytes."""
        length = self._number("Q")
        self._skip(length)
        return length

    def _number(self, code: str) -> int:
        size = struct.calcsize(f"<{code}")
        self._take(size)
        return struct.unpack(self.order + code, self.file.read(size))[0]

    def _skip(self, count: int) -> None:
        self._take(count)
        self.file.seek(count, os.SEEK_CUR)

    def _take(self, count: int) -> None:
        if count > self.left_bytes:
            raise ValueError(f"its header goes on for {count} bytes, {self.left_bytes} are left")
        self.left_bytes -= count
