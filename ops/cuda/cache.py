"""Machine code on disk, so that what one process compiled no later one has to compile again.

A file for each kernel, named by a digest of all that its code depends on: a digest of the name and
the code, then the code. Any number of processes may read and write at once; what another one, or
the user, removes is compiled again.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .. import cache_folder

logger = logging.getLogger(__name__)

FOLDER = "nvrtc"
SUFFIX = ".code"
# When a file is written, the oldest beyond these go.
MOST_FILES = 256
MOST_BYTES = 64 << 20
DIGEST_BYTES = hashlib.sha256().digest_size
# A file that was being written so long ago was left behind.
PART_SECONDS = 3600
_warned: set[Path] = set()
_host: list[Path] = []


def keep_in(place: Path) -> None:
    """Keep the files in a folder of the program that this one is part of, not in the user's.

    LOWBIT_CACHE comes first all the same.
    """
    _host[:] = [place]


def folder() -> Path:
    """Return where the files lie, whether there are any or not."""
    if _host and not os.environ.get("LOWBIT_CACHE"):
        return _host[0] / FOLDER
    return cache_folder.folder() / FOLDER


def kept(parts: Iterable[str], compiled: Callable[[], bytes]) -> bytes:
    """Return the code of a kernel: from disk, or else what `compiled` gives, put there.

    parts: all that the code depends on, in order. A folder that cannot be written to is no error:
    the log has the reason, once.
    """
    name = hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()
    file = folder() / f"{name}{SUFFIX}"
    code = _read(file)
    if code is None:
        code = compiled()
        _write(file, code)
    return code


def _digest(file: Path, code: bytes) -> bytes:
    """Return what a file begins with: of its name too, lest another kernel's take its place."""
    return hashlib.sha256(file.name.encode() + code).digest()


def _read(file: Path) -> bytes | None:
    """Return the code that a file holds, None where it holds none or not what was written."""
    if not cache_folder.has_home(file):
        return None
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        # Where it cannot be replaced either, writing says so.
        logger.debug("%s: %s. It is compiled anew.", file, error)
        return None
    code = content[DIGEST_BYTES:]
    if content[:DIGEST_BYTES] != _digest(file, code):
        logger.debug("%s is not as it was written. It is compiled anew.", file)
        return None
    return code


def _write(file: Path, code: bytes) -> None:
    """Put a file there and make room; where that cannot be, say so."""
    try:
        cache_folder.write(file, _digest(file, code) + code)
    except OSError as error:
        _warn(file.parent, error)
        return
    try:
        _trim(file.parent)
    except OSError as error:
        # Another process removes them too, or Windows has one open.
        logger.debug("%s. Old files go when the next one is written.", error)


def _warn(place: Path, error: OSError) -> None:
    """Say, once for a folder, that it takes no files."""
    if place not in _warned:
        _warned.add(place)
        text = "%s: kernels cannot be kept there, every process compiles them again: %s"
        logger.warning(text, place, error)


def _trim(place: Path) -> None:
    """Remove the oldest files beyond MOST_FILES and MOST_BYTES, and those left half-written.

    Raises OSError when one cannot be removed.
    """
    abouts, total = {}, 0
    for file in place.glob(f"*{SUFFIX}*"):
        about = file.stat()
        if file.suffix != cache_folder.PART:
            abouts[file] = about
        elif about.st_mtime < time.time() - PART_SECONDS:
            file.unlink(missing_ok=True)
    for count, file in enumerate(sorted(abouts, key=lambda x: -abouts[x].st_mtime_ns), 1):
        total += abouts[file].st_size
        if count > MOST_FILES or total > MOST_BYTES:
            file.unlink(missing_ok=True)
