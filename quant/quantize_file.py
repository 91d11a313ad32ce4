"""Quantizing a checkpoint file into another, in memory bounded by its largest tensor."""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from . import recipe
from .checkpoint import Checkpoint, CheckpointError, CheckpointWriter, open_checkpoint
from .checkpoint.writer import ENTRY_BYTES
from .convert import Plan, plan, stream
from .record import LayerRecord

# Bytes of metadata for one layer beside its name and reason: format, error, shape, JSON.
RECORD_BYTES = 160
TENSORS_PER_LAYER = 6

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What `quantize_file` did. Sizes are of tensors, in bytes."""

    path: str
    plan: Plan
    source_bytes: int
    result_bytes: int
    seconds: float

    @property
    def records(self) -> list[LayerRecord]:
        return self.plan.records


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format_name: str,
    *,
    recipe_name: str = recipe.AUTO,
    keep: Iterable[str] = (),
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Write `source`, quantized, to `target`.

    progress: called with (bytes of source done, all bytes) after each tensor. Raises
    CheckpointError when `target` exists and `overwrite` is false, and what `plan`, `stream` and
    the writer raise; `target` is then absent or as it was.
    """
    checkpoint = open_source(source, target, overwrite)
    work = plan(checkpoint, format_name, recipe_name, keep)
    return write(work, target, device, progress)


def open_source(source, target, overwrite: bool) -> Checkpoint:
    """Return `source`, opened, once it is known that `target` may be written."""
    target = os.fspath(target)
    if not target.endswith(".safetensors"):
        raise CheckpointError(f"{target}: the name must end with .safetensors")
    checkpoint = open_checkpoint(source)
    if os.path.exists(target):
        _check_replaceable(checkpoint, target, overwrite)
    return checkpoint


def write(work: Plan, target, device: torch.device | str, progress: Progress) -> Result:
    """Carry out `work` and write what it gives to `target`, which takes its name at the end."""
    target = os.fspath(target)
    sizes = {s.target: s.size_bytes for s in work.steps}
    total, done, written = sum(sizes.values()), 0, 0
    start = time.perf_counter()
    with CheckpointWriter(target, **_header_room(work)) as writer:
        for name, tensor in stream(work, device):
            writer.add(name, tensor)
            written += tensor.nbytes
            done += sizes.get(name, 0)
            progress(done, total)
        writer.finish(work.metadata())
    seconds = time.perf_counter() - start
    return Result(target, work, work.checkpoint.size_bytes, written, seconds)


def _check_replaceable(checkpoint: Checkpoint, target: str, overwrite: bool) -> None:
    if os.path.isdir(target):
        raise CheckpointError(f"{target}: it is a folder")
    if any(os.path.samefile(path, target) for path in {i.path for i in checkpoint.values()}):
        raise CheckpointError(f"{target}: source and target are the same file")
    if not overwrite:
        raise CheckpointError(f"{target}: it exists; pass --overwrite to replace it")


def _header_room(work: Plan) -> dict[str, int]:
    """Return the room that the header of the result takes at most."""
    names = metadata = 0
    for step in work.steps:
        name_bytes = len(json.dumps(step.target)) + ENTRY_BYTES
        names += name_bytes * (TENSORS_PER_LAYER if step.choice.format else 1)
        if step.layer:
            # JSON inside JSON: what the record holds is escaped twice.
            words = step.layer + step.choice.reason
            metadata += len(json.dumps(json.dumps(words))) + 2 * RECORD_BYTES
    metadata += len(json.dumps(work.checkpoint.metadata)) + 4 * RECORD_BYTES
    return {"names_bytes": names, "metadata_bytes": metadata}
