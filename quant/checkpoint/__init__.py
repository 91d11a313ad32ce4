"""Reading checkpoints and writing safetensors ones, a tensor at a time."""

import os

from .gguf_file import GGUFCheckpoint
from .header import CheckpointError, TensorInfo
from .reader import GGUF_SUFFIX, Checkpoint
from .writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointError", "CheckpointWriter", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Return the checkpoint at `path`: safetensors, a folder or index of shards, or GGUF.

    Raises CheckpointError when it is no readable checkpoint.
    """
    is_gguf = os.fspath(path).lower().endswith(GGUF_SUFFIX)
    return GGUFCheckpoint(path) if is_gguf else Checkpoint(path)
