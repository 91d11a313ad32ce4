"""The file in which `lowbit tune` keeps what won, outside the repository.

JSON: {"schema": 1, "sections": [{"for": {…}, "entries": [{…}, …]}, …]}. A section is for one
operation on one kind of GPU with certain versions and sources, all of which `for` names; its
entries count where all of them are the same. Written in one step, under a lock.
"""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cache_folder

logger = logging.getLogger(__name__)

SCHEMA = 1
FILE = "tuning.json"
# A file that was not understood is kept under this name when a new one takes its place.
SET_ASIDE = "tuning.unread.json"

# Scheme, N, K and bucket of M.
Key = tuple[str, int, int, int]
Mark = dict[str, str | int]


class UnreadableError(ValueError):
    """The file does not hold what it should; the message says what is wrong."""


@dataclass(frozen=True)
class Entry:
    """What won. m: the bucket. rows: M at which the times, medians, were taken.

    choice, instead_of: the fields of a tile (`scaled_mm`), the name of a backend (`linear`), or
    ways and the name of torch's (`attention`, where n is the keys and k the head size).
    instead_ms is None where what is taken without the entry cannot run.
    """

    scheme: str
    n: int
    k: int
    m: int
    rows: int
    choice: Any
    ms: float
    instead_of: Any
    instead_ms: float | None

    @property
    def key(self) -> Key:
        return self.scheme, self.n, self.k, self.m

    @classmethod
    def read(cls, value: Any) -> "Entry":
        """Return the entry that a JSON object holds. Raises UnreadableError."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            raise UnreadableError(f"an entry holds {', '.join(sorted(names))}; this is {value!r}")
        sizes = [value[name] for name in ("n", "k", "m", "rows")]
        times = [value["ms"], value["instead_ms"] or value["ms"]]
        whole = all(type(size) is int and size > 0 for size in sizes)
        if not (whole and isinstance(value["scheme"], str)):
            raise UnreadableError(f"an entry is for {value['scheme']!r} and sizes {sizes}")
        if not all(type(ms) in (int, float) and ms > 0 for ms in times):
            raise UnreadableError(f"an entry has times {times}")
        return cls(**value)


@dataclass(frozen=True)
class Section:
    """Entries, and the mark of what they are good for."""

    mark: Mark
    entries: tuple[Entry, ...]


def path() -> Path:
    """Return the file's path, whether it is there or not."""
    return cache_folder.folder() / FILE


def read(file: Path) -> list[Section]:
    """Return the sections of a file, none where there is no file.

    Raises UnreadableError when it is no file of `lowbit tune`, or of another schema, and OSError.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        schema, sections = content["schema"], content["sections"]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnreadableError(f"it is no file of `lowbit tune` ({error!r})") from error
    if schema != SCHEMA:
        raise UnreadableError(f"it has schema {schema!r}, this version of the pack reads {SCHEMA}")
    try:
        return [_section(value) for value in sections]
    except (ValueError, TypeError, KeyError) as error:
        raise UnreadableError(f"a section is malformed ({error!r})") from error


def _section(value: Any) -> Section:
    return Section(dict(value["for"]), tuple(Entry.read(entry) for entry in value["entries"]))


def update(file: Path, mark: Mark, changes: Mapping[Key, Entry | None]) -> None:
    """Write entries to the section of `mark`, None: remove; other sections stay as they are.

    Sections that differ from `mark` in the source alone go: no version at hand reads them. What
    another process wrote in the meantime is kept. Raises OSError when the file cannot be written.
    """
    cache_folder.make(file.parent)
    with _locked(file.with_suffix(".lock")):
        sections = _read_or_set_aside(file)
        entries = {e.key: e for part in sections if part.mark == mark for e in part.entries}
        entries.update(changes)
        kept = [part for part in sections if not _same_but_source(part.mark, mark)]
        found = tuple(entry for _, entry in sorted(entries.items()) if entry is not None)
        _write(file, [*kept, Section(mark, found)] if found else kept)


def clear(file: Path) -> int:
    """Remove the file and return how many entries it held; 0 where none, or none readable."""
    if not file.exists():
        return 0
    with _locked(file.with_suffix(".lock")):
        try:
            count = sum(len(part.entries) for part in read(file))
        except UnreadableError:
            count = 0
        file.unlink(missing_ok=True)
    return count


def _same_but_source(one: Mark, other: Mark) -> bool:
    return {**one, "source": ""} == {**other, "source": ""}


def _read_or_set_aside(file: Path) -> list[Section]:
    try:
        return read(file)
    except UnreadableError as error:
        aside = file.with_name(SET_ASIDE)
        logger.warning("%s: %s. It is now %s, a new one takes its place.", file, error, aside)
        cache_folder.replace(file, aside)
        return []


def _write(file: Path, sections: list[Section]) -> None:
    content = {
        "schema": SCHEMA,
        "sections": [
            {"for": part.mark, "entries": [dataclasses.asdict(e) for e in part.entries]}
            for part in sections
        ],
    }
    cache_folder.write(file, json.dumps(content, indent=1, allow_nan=False).encode("utf-8"))


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here. A process that ends gives the lock up."""
    with open(lock, "a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            # Waits for ten seconds, then raises OSError.
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            yield
