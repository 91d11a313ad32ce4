"""How far two checkpoints of one model are apart, tensor by tensor.

Quantized layers are compared as dequantized; names are aligned by the host's, so that a file with a
key prefix or with diffusers' names meets one without.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import families
from .checkpoint import Checkpoint, CheckpointError, open_checkpoint
from .checkpoint.stored import LEGACY_FLAG, MARKER, StoredLayer, logical_shapes, stored_layers

# Elements in float64 at a time.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Difference:
    """One tensor that both files hold, by the host's name.

    error: |a - b| / |a| in L2; infinite where only a is zero, NaN where either holds NaN, None
    where the shapes differ. linear: whether it is a weight [N, K]. formats: in a and in b.
    """

    name: str
    error: float | None
    linear: bool
    formats: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. differences: worst first. only_a, only_b: names on one side alone."""

    differences: tuple[Difference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    """A checkpoint by the host's names. names: host's name → tensor name in the file."""

    checkpoint: Checkpoint
    stored: dict[str, StoredLayer]
    names: dict[str, str]

    def read(self, name: str) -> torch.Tensor:
        layer = self._layer(name)
        if layer:
            return layer.dequantize(self.checkpoint)
        return self.checkpoint.read(self.names[name])

    def format(self, name: str) -> str:
        layer = self._layer(name)
        info = self.checkpoint[self.names[name]]
        plain = info.encoding or str(info.dtype).removeprefix("torch.")
        return layer.title if layer else plain

    def shape(self, name: str) -> tuple[int, ...]:
        layer = self._layer(name)
        if layer:
            return layer.logical_shape(self.checkpoint)
        return self.checkpoint[self.names[name]].shape

    def _layer(self, name: str) -> StoredLayer | None:
        module, _, part = self.names[name].rpartition(".")
        return self.stored.get(module) if part == "weight" else None


def compare(
    path_a: str, path_b: str, tick: Callable[[int, int], None] = lambda done, total: None
) -> Comparison:
    """Return how far the checkpoint `path_b` is from `path_a`, relative to the latter.

    tick: called with (tensors done, all tensors). Holds one tensor of each file at a time.
    Raises CheckpointError when a file cannot be read, its markings are wrong, or no tensor of one
    has a name that the other has too.
    """
    a, b = _open(path_a), _open(path_b)
    common = [name for name in a.names if name in b.names]
    if not common:
        raise CheckpointError(f"{path_a} and {path_b} have no tensor in common: of one model?")
    differences = []
    for done, name in enumerate(common, start=1):
        differences.append(_difference(a, b, name))
        tick(done, len(common))
    differences.sort(key=lambda d: _badness(d.error), reverse=True)
    return Comparison(
        tuple(differences),
        tuple(name for name in a.names if name not in b.names),
        tuple(name for name in b.names if name not in a.names),
    )


def _badness(error: float | None) -> float:
    return math.inf if error is None or math.isnan(error) else error


def _open(path: str) -> _Side:
    checkpoint = open_checkpoint(path)
    stored = stored_layers(checkpoint)
    model = families.recognise(logical_shapes(checkpoint, stored))
    scales = {t for layer in stored.values() for p, t in layer.parts.items() if p != "weight"}
    names = {}
    for name in checkpoint:
        if name not in scales and name.rpartition(".")[2] not in (MARKER, LEGACY_FLAG):
            names[model.renamed.get(name, name)] = name
    return _Side(checkpoint, stored, names)


def _difference(a: _Side, b: _Side, name: str) -> Difference:
    shapes = a.shape(name), b.shape(name)
    error = relative_error(a.read(name), b.read(name)) if shapes[0] == shapes[1] else None
    linear = name.endswith(".weight") and len(shapes[0]) == 2
    return Difference(name, error, linear, (a.format(name), b.format(name)), shapes)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |a - b| / |a| in L2, summed in float64; a and b of one shape, any dtypes."""
    wrong = total = 0.0
    for x, y in _pieces(a, b):
        wrong += (x - y).square().sum().item()
        total += x.square().sum().item()
    if total:
        return math.sqrt(wrong / total)
    return math.inf if wrong else wrong


def _pieces(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    pairs = zip(
        a.reshape(-1).split(CHUNK_ELEMENTS), b.reshape(-1).split(CHUNK_ELEMENTS), strict=True
    )
    return ((x.double(), y.double()) for x, y in pairs)
