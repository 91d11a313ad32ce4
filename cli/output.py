"""What the commands print: sizes, tables, JSON, and the progress of long work."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

KILO = 1000
UNITS = ("B", "kB", "MB", "GB", "TB")
BAR_WIDTH = 30
REDRAW_SECONDS = 0.1
# Without a terminal: one line for each of this many parts of the work.
LINES = 10
MINUTE = 60


def size(count: float) -> str:
    """Return a number of bytes in words, with three digits: 14.2 GB."""
    unit = 0
    while count >= KILO and unit < len(UNITS) - 1:
        count, unit = count / KILO, unit + 1
    return f"{count:.3g} {UNITS[unit]}"


def duration(seconds: float) -> str:
    """Return seconds in words: 3:07, or 12 s."""
    whole = round(seconds)
    return f"{whole} s" if whole < MINUTE else f"{whole // MINUTE}:{whole % MINUTE:02d}"


def several(count: int, noun: str) -> str:
    """Return a count with its noun: 1 layer, 2 layers."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shortened(names: Sequence[str], limit: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def table(rows: Iterable[Sequence[str]], indent: str = "  ") -> None:
    """Print rows in columns."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print((indent + "  ".join(cells)).rstrip())


def as_json(value: Any) -> None:
    """Print one JSON object; dataclasses become objects, what JSON cannot express null."""
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """Context manager that shows how far work is: a bar on a terminal, else a line every 10 %.

    unit_bytes: whether the work is counted in bytes, which gives MB/s.
    """

    def __init__(self, title: str, *, unit_bytes: bool = True, stream: TextIO | None = None):
        self._title = title
        self._unit_bytes = unit_bytes
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.perf_counter()
        self._drawn = -math.inf
        self._lines = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._terminal and self._drawn > -math.inf:
            print(file=self._stream)

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` is done."""
        now = time.perf_counter()
        share = done / total if total else 1.0
        text = f"{share:4.0%}  {self._pace(done, total, now - self._start)}"
        if self._terminal:
            if now - self._drawn >= REDRAW_SECONDS or done >= total:
                self._drawn = now
                bar = ("█" * round(share * BAR_WIDTH)).ljust(BAR_WIDTH, "·")
                # Clears to the end of the line, which the last text may have reached further.
                print(f"\r{self._title} {bar} {text}\x1b[K", end="", file=self._stream, flush=True)
        elif int(share * LINES) > self._lines:
            self._lines = int(share * LINES)
            print(f"{self._title} {text}", file=self._stream, flush=True)

    def _pace(self, done: int, total: int, seconds: float) -> str:
        rate = done / seconds if seconds else 0.0
        left = f"{duration((total - done) / rate)} left" if rate else ""
        return f"{size(rate)}/s, {left}" if self._unit_bytes else left
