"""Safetensors files made by hand, as broken as a test wants them."""

import json
import struct

import pytest


@pytest.fixture
def raw_file(tmp_path):
    """A function (header: dict or bytes, data, length) -> path of a file of just these bytes."""

    def write(header, data: bytes = b"", length: int | None = None) -> str:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "raw.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return str(path)

    return write
