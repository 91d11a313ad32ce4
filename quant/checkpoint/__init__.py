"""Reading and writing safetensors checkpoints a tensor at a time."""

from .header import CheckpointError, TensorInfo
from .reader import Checkpoint
from .writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointError", "CheckpointWriter", "TensorInfo"]
