"""Writing a safetensors file while its tensors are still being made.

Tensors go to a file beside the target as they come; the header, whose place is kept free at the
start, is written last, and the file then takes the target's name in one step. Until then the target
is absent or as it was, whatever happens.
"""

import contextlib
import os
import tempfile
from collections.abc import Mapping

import torch

from .header import CODES, LENGTH_BYTES, METADATA, CheckpointError, encode_header

# Bytes kept in the header for one tensor beside its name, and for metadata.
ENTRY_BYTES = 160
# Small tensors wait in memory and go last, sorted by alignment: a marker of odd length written
# between two weights would leave the second misaligned.
SMALL_BYTES = 1 << 16


class CheckpointWriter:
    """Context manager that writes one safetensors file; on an exception nothing is left behind."""

    def __init__(self, path: str | os.PathLike, *, names_bytes: int, metadata_bytes: int):
        """Open a file beside `path`.

        names_bytes: at least the length of all tensor names as JSON, plus `ENTRY_BYTES` for each.
        metadata_bytes: at least what the metadata takes as JSON.
        """
        self.path = os.fspath(path)
        total = names_bytes + metadata_bytes + ENTRY_BYTES
        self._header_bytes = -(-total // 4096) * 4096 - LENGTH_BYTES
        self._entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        self._small: dict[str, torch.Tensor] = {}
        self._offset = 0
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            raise CheckpointError(f"{self.path}: there is no folder {folder}")
        try:
            handle, self._temporary = tempfile.mkstemp(
                prefix=f".{os.path.basename(self.path)}.", suffix=".partial", dir=folder
            )
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        self._file = os.fdopen(handle, "wb")
        self._file.seek(LENGTH_BYTES + self._header_bytes)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Closing writes what is buffered; on a full disk that fails, and the file must go still.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, which may change afterwards.

        Raises CheckpointError when the disk refuses it, the name is taken or reserved, or
        safetensors has no such dtype.
        """
        if name in self._entries or name in self._small:
            raise CheckpointError(f"{self.path}: tensor {name} is written twice")
        if name == METADATA or tensor.dtype not in CODES:
            raise CheckpointError(f"{self.path}: tensor {name} of {tensor.dtype} has no place here")
        tensor = tensor.to("cpu").detach().contiguous()
        if tensor.nbytes < SMALL_BYTES:
            self._small[name] = tensor.clone()
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        start, self._offset = self._offset, self._offset + tensor.nbytes
        self._entries[name] = (tensor.dtype, tuple(tensor.shape), start, self._offset)
        if tensor.nbytes:
            with self._reporting():
                self._file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what waits and the header, then give the file its name."""
        for name, tensor in sorted(self._small.items(), key=lambda i: -i[1].dtype.itemsize):
            self._write(name, tensor)
        header = encode_header(self._entries, metadata, self._header_bytes)
        with self._reporting():
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            # mkstemp makes files that only their owner reads; a checkpoint is an ordinary file.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(self._temporary, 0o666 & ~mask)
            os.replace(self._temporary, self.path)

    @contextlib.contextmanager
    def _reporting(self):
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror or error}") from error
