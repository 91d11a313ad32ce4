"""What `lowbit tune` has kept on this machine, and what of it counts here and now."""

from dataclasses import dataclass
from typing import Any

import torch

from ...ops import tuning, tuning_file
from ...ops.attention import auto
from ...ops.attention.ways import SDPA
from ...ops.fp4_mm.choice import from_choice
from ...ops.tuning_file import Entry, Mark


@dataclass(frozen=True)
class Kept:
    """Entries for one operation on one kind of GPU. counts: whether they are in use here."""

    mark: Mark
    counts: bool
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Remembered:
    """What the file holds. problem: why it cannot be used, or None. count: of all entries."""

    path: str
    problem: str | None
    count: int
    sections: tuple[Kept, ...]


def remembered() -> Remembered:
    """Return what the file holds; nothing where there is none, or it cannot be read."""
    sections, problem = tuning.stored()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    marks = [tuning.mark(op, tuning.gpu(device)) for device in devices for op in tuning.SOURCES]
    kept = tuple(Kept(part.mark, part.mark in marks, part.entries) for part in sections)
    count = sum(len(part.entries) for part in sections)
    return Remembered(str(tuning_file.path()), problem, count, kept)


def in_short(choice: Any) -> str:
    """Return the choice of an entry in short: a tile, a backend's name, or ways of attention."""
    try:
        if isinstance(choice, list):
            return ", ".join(ranked.way for ranked in auto.from_choice(choice)) or SDPA
        return str(from_choice(choice))
    except ValueError:
        return str(choice)
