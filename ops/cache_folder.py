"""The pack's folder in the user's folder of caches, and how files are written there."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

# On Windows a file that another process reads cannot be replaced; reading takes milliseconds.
REPLACE_TRIES = 50
REPLACE_WAIT_SECONDS = 0.02
# How files end that are being written.
PART = ".part"


def folder() -> Path:
    """Return the folder: LOWBIT_CACHE, or `lowbit` in the user's folder of caches."""
    if os.environ.get("LOWBIT_CACHE"):
        return Path(os.path.expanduser(os.environ["LOWBIT_CACHE"]))
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        # The XDG specification has relative paths ignored.
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = named if named.is_absolute() else home / ".cache"
    return base / "lowbit"


def has_home(path: Path) -> bool:
    """Return whether a path has the home folder that it names.

    Of a user without one `expanduser` leaves it, and it would be a folder of that name wherever the
    program happens to run.
    """
    return not (path.parts and path.parts[0].startswith("~"))


def make(path: Path) -> None:
    """Make a folder and those above it, where they are missing. Raises OSError."""
    if not has_home(path):
        raise FileNotFoundError(f"{path}: there is no such home folder; set LOWBIT_CACHE")
    path.mkdir(parents=True, exist_ok=True)


def write(file: Path, content: bytes) -> None:
    """Write a file in one step: others see it whole or as it was. Raises OSError.

    A process that ends meanwhile leaves a file of that name with more after it, and `.part`.
    """
    make(file.parent)
    # Not by `tempfile`, which makes files for their owner alone, and on Windows tries a folder that
    # refuses them two thousand million times.
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}{PART}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def replace(source: Path, target: Path) -> None:
    """Move a file over another one. Raises OSError."""
    for left in reversed(range(REPLACE_TRIES)):
        try:
            return os.replace(source, target)
        except PermissionError:
            if sys.platform != "win32" or not left:
                raise
            time.sleep(REPLACE_WAIT_SECONDS)
