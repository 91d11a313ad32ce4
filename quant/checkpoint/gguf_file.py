"""A GGUF file of a diffusion model, in the host's names, as ComfyUI-GGUF's converter writes it.

Blocks are dequantized to float32 while they are read, some rows at a time. The package `gguf` knows
the header and the arithmetic of the blocks; the data are read with plain reads, not mapped.
Source: the GGUF format description (dimensions lie reversed); ComfyUI-GGUF `tools/convert.py`
(reshaped tensors bear their true shape as `comfy.gguf.orig_shape.NAME`).
"""

import importlib.util
import math
import os
from functools import cache

import torch

from .gguf_header import check_header
from .header import MAX_DIMENSIONS, CheckpointError, TensorInfo
from .reader import Checkpoint, read_into

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
# What llama.cpp calls the tensors of language models and their image encoders.
TEXT_NAMES = ("blk.", "enc.blk.", "v.blk.", "token_embd.")
# Values dequantized at a time; the arithmetic in numpy takes some ten times their memory.
CHUNK_ELEMENTS = 1 << 20
PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class GGUFCheckpoint(Checkpoint):
    """The tensors of a GGUF file by name, in the order in which they lie there."""

    def __init__(self, path: str | os.PathLike):
        """Open `path`; raises CheckpointError when it is no readable GGUF of a diffusion model."""
        self.path = os.fspath(path)
        self.metadata = {}
        self._tensors = dict(sorted(_headers(self.path).items(), key=lambda item: item[1].start))
        if not self._tensors:
            raise CheckpointError(f"{self.path}: it holds no tensors")
        text = [name for name in self._tensors if name.startswith(TEXT_NAMES)]
        if text:
            raise CheckpointError(
                f"{self.path}: {text[0]} is of a text model, not of a diffusion one"
            )
        for name in self._tensors:
            weight = f"{name.removesuffix('.bias')}.weight"
            if name.endswith("embedding.bias") and weight not in self._tensors:
                raise CheckpointError(
                    f"{self.path}: {weight} is missing: an unfinished GGUF, to which the last step "
                    "of its converter has not added the tensors of five dimensions"
                )

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, blocks as float32. Raises CheckpointError when the file is cut."""
        info = self[name]
        if not info.encoding:
            return super().read(name)
        values = torch.empty(math.prod(info.shape), dtype=torch.float32)
        try:
            with open(info.path, "rb", buffering=0) as file:
                file.seek(info.start)
                _dequantize(file, info, values)
        except OSError as error:
            raise CheckpointError(f"{info.path}: reading {name}: {error}") from error
        return values.reshape(info.shape)


def _dequantize(file, info: TensorInfo, values: torch.Tensor) -> None:
    """Fill `values` [elements] with what the blocks hold that begin where `file` stands."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[info.encoding]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    step = CHUNK_ELEMENTS // elements * elements
    for start in range(0, values.numel(), step):
        piece = values[start : start + step]
        data = np.empty((piece.numel() // elements, size), dtype=np.uint8)
        read_into(file, memoryview(data.reshape(-1)))
        piece.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)).reshape(-1))


def _headers(path: str) -> dict[str, TensorInfo]:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{path}: reading GGUF takes the package gguf: pip install gguf")
    import gguf

    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
        # A field of the header says more than that it is there only when it is looked at.
        found = {tensor.name: _info(path, reader, tensor) for tensor in reader.tensors}
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a GGUF file, or truncated: {error}") from error
    _check_places(path, found, int(reader.data_offset))
    return found


def _check_places(path: str, found: dict[str, TensorInfo], start: int) -> None:
    """Raise CheckpointError for tensors beyond the file, on one another or before `start`.

    start: where the header ends. Gaps, by which tensors are aligned, and empty tensors are right.
    """
    size, free = os.path.getsize(path), start
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.end > size:
            raise CheckpointError(f"{path}: truncated: {name} ends at byte {info.end} of {size}")
        if info.start < free:
            raise CheckpointError(
                f"{path}: malformed: {name} begins at byte {info.start}, "
                f"what lies before it ends at {free}; fetch the file again"
            )
        free = info.end


def _info(path: str, reader, tensor) -> TensorInfo:
    import gguf

    kind = tensor.tensor_type.name
    start, end = int(tensor.data_offset), int(tensor.data_offset) + int(tensor.n_bytes)
    shape = tuple(int(size) for size in reversed(tensor.shape))
    field = reader.get_field(ORIGINAL_SHAPE + tensor.name)
    if field is not None:
        if len(field.data) > MAX_DIMENSIONS:
            # Their product could take minutes, and the message be as long as the file.
            raise ValueError(f"{tensor.name} was never of {len(field.data)} dimensions")
        original = tuple(int(field.parts[i][0]) for i in field.data)
        if any(size < 0 for size in original) or math.prod(original) != math.prod(shape):
            raise ValueError(f"{tensor.name} of {list(shape)} was never {list(original)}")
        shape = original
    if kind in PLAIN:
        return TensorInfo(path, PLAIN[kind], shape, start, end)
    if not _has_arithmetic(kind):
        raise CheckpointError(
            f"{path}: {tensor.name} is in blocks of {kind}, which the installed gguf has no "
            "arithmetic for; try a later one, or another file of the model"
        )
    elements, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    if math.prod(shape) // elements * size != end - start or math.prod(shape) % elements:
        raise ValueError(f"{tensor.name} of {list(shape)} is not in whole blocks of {kind}")
    return TensorInfo(path, torch.float32, shape, start, end, kind)


@cache
def _has_arithmetic(kind: str) -> bool:
    """Return whether the package dequantizes blocks of `kind`; it says so only when asked to."""
    import gguf
    import numpy as np

    block_type = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[block_type]
    try:
        gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), block_type)
    except NotImplementedError:
        return False
    return True
