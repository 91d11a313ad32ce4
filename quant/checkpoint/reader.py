"""A checkpoint on disk: one safetensors file, or a folder of shards with its index.

Tensors are read with plain reads into memory of their own, not mapped: what has been dropped is
gone, so that a pass over a file of any size holds one tensor at a time.
"""

import os
from collections.abc import Iterator, Mapping

import torch

from .header import CheckpointError, TensorInfo, parse_json, read_header

INDEX_SUFFIX = ".safetensors.index.json"
FILE_SUFFIXES = (".safetensors", ".sft")
GGUF_SUFFIX = ".gguf"
# What torch.save writes: loading such a file runs whatever is in it.
PICKLES = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint by name, in the order in which they lie on disk."""

    def __init__(self, path: str | os.PathLike):
        """Open `path`; raises CheckpointError when it is no readable checkpoint."""
        self.path = os.fspath(path)
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for file in _files(self.path):
            tensors, metadata = read_header(file)
            twice = self._tensors.keys() & tensors.keys()
            if twice:
                raise CheckpointError(f"{self.path}: {min(twice)} is in two shards")
            self._tensors.update(tensors)
            self.metadata.update(metadata)
        if not self._tensors:
            raise CheckpointError(f"{self.path}: it holds no tensors")

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.size_bytes for info in self.values())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, in memory of its own. Raises CheckpointError when the file is cut."""
        info = self[name]
        data = torch.empty(info.size_bytes, dtype=torch.uint8)
        if info.size_bytes:
            view = memoryview(data.numpy())
            try:
                with open(info.path, "rb", buffering=0) as file:
                    file.seek(info.start)
                    read_into(file, view)
            except OSError as error:
                raise CheckpointError(f"{info.path}: reading {name}: {error}") from error
        return data.view(info.dtype).reshape(info.shape)


def read_into(file, view: memoryview) -> None:
    """Fill `view` from an unbuffered file. Raises OSError where that ends."""
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError("the file ends in the middle of the tensor")
        view = view[count:]


def _files(path: str) -> list[str]:
    if os.path.isdir(path):
        return _shards(path)
    if path.endswith(INDEX_SUFFIX):
        return _indexed(path)
    if path.lower().endswith(PICKLES):
        raise CheckpointError(
            f"{path}: a pickle, which can run any code and is never loaded, not a .safetensors file"
        )
    if path.lower().endswith(GGUF_SUFFIX):
        raise CheckpointError(f"{path}: GGUF is read of diffusion models only, not here")
    if not path.endswith(FILE_SUFFIXES):
        raise CheckpointError(f"{path}: not a .safetensors file, a folder of them, or a .gguf file")
    return [path]


def _shards(folder: str) -> list[str]:
    names = sorted(os.listdir(folder))
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        return _indexed(os.path.join(folder, indexes[0]))
    files = [n for n in names if n.endswith(FILE_SUFFIXES)]
    if indexes or len(files) != 1:
        raise CheckpointError(
            f"{folder}: a folder of shards needs one *{INDEX_SUFFIX}, found {len(indexes)} and "
            f"{len(files)} safetensors files"
        )
    return [os.path.join(folder, files[0])]


def _indexed(index: str) -> list[str]:
    try:
        with open(index, "rb") as file:
            text = file.read()
    except OSError as error:
        raise CheckpointError(f"{index}: not a readable index of shards: {error}") from error
    try:
        content = parse_json(text, f"{index}: not a readable index of shards: it")
        names = sorted(set(content["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a readable index of shards: {error}") from error
    folder = os.path.dirname(index)
    outside = [n for n in names if not isinstance(n, str) or os.path.basename(n) != n]
    if outside:
        raise CheckpointError(f"{index}: shard {outside[0]!r} is not beside its index")
    missing = [n for n in names if not os.path.isfile(os.path.join(folder, n))]
    if missing:
        raise CheckpointError(f"{index}: shard {missing[0]} is missing")
    return [os.path.join(folder, n) for n in names]
