"""What `lowbit tune` measured here, as operations ask for it.

An entry is for one operation, scheme, weight [N, K] and bucket of M, and there is one only where
something beat what is taken without it: another tile (`scaled_mm`), another backend (`linear`).
Those of `attention` are for a number of tokens, whatever won (`attention/auto.py`).
Entries count on the kind of GPU on which they were measured, with the same versions and the same
source of our kernels. `tuning_file.py` says where they lie; they are read when first asked for.
"""

import bisect
import functools
import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import tuning_file
from .tuning_file import Entry, Key, Mark, Section, UnreadableError

logger = logging.getLogger(__name__)

# A call's M belongs to the least of these that is not below it; beyond the last nothing is tuned.
# They are so close together that what is best at one end of a bucket may be so at the other.
BUCKETS = (
    *(1, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    *(12288, 16384, 24576, 32768, 49152, 65536, 98304, 131072),
)
# Names under which Triton is published.
TRITON = ("triton", "triton-windows", "pytorch-triton")
# Our sources that the speed of an operation depends on.
SOURCES = {
    "scaled_mm": ("scaled_mm/kernel*.py", "scaled_mm/triton.py"),
    "fp4_mm": (
        "fp4_mm/*.py",
        "decode_fp4/kernel.py",
        "scaled_mm/kernel*.py",
        "scaled_mm/triton.py",
    ),
    "linear": (
        *(f"{folder}/*.py" for folder in ("linear", "quantize_rows", "scaled_mm", "decode_fp4")),
        *("fp4_mm/*.py", "fp4_scaled_mm/*.py", "fp4_scaled_mm/kernels/*.cu"),
        *("quantize_rows/kernels/*.cu", "scaled_mm/kernels/*.cu", "cuda/*.cu"),
    ),
    "attention": (
        *("attention/*.py", "attention/kernels/*.py", "attention/kernels/*.cu"),
        *("cuda/*.cu", "cuda/*.py", "replay.py", "launch.py"),
    ),
}
# Calls that are remembered; to look one up again costs microseconds.
REMEMBERED = 4096


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: what a measurement is good for. processors: multiprocessors."""

    name: str
    capability: tuple[int, int]
    processors: int


_CACHES: list[Callable[[], None]] = []
# What `use` set, which goes before the file; None where there is to be no entry.
_used: dict[tuple[str, Gpu], dict[Key, Entry | None]] = {}


def cached(function: Callable) -> Callable:
    """Return `function` with its last results remembered until entries change; a decorator."""
    wrapped = functools.lru_cache(maxsize=REMEMBERED)(function)
    when_forgotten(wrapped.cache_clear)
    return wrapped


def when_forgotten(clear: Callable[[], None]) -> None:
    """Have `clear` called whenever entries change: it drops what follows from them."""
    _CACHES.append(clear)


def forget() -> None:
    """Forget what follows from entries: the next call reads the file again."""
    for clear in _CACHES:
        clear()


def bucket(m: int) -> int | None:
    """Return the bucket of M that `m` rows belong to, None beyond the last."""
    index = bisect.bisect_left(BUCKETS, m)
    return BUCKETS[index] if index < len(BUCKETS) else None


def bucket_rows(m: int) -> tuple[int, int]:
    """Return the least and the greatest M of a bucket."""
    index = BUCKETS.index(m)
    return (BUCKETS[index - 1] + 1 if index else 1), m


@functools.cache
def gpu(device: torch.device) -> Gpu | None:
    """Return the kind of GPU that a device is, None for any other device."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, (found.major, found.minor), found.multi_processor_count)


def mark(op: str, gpu: Gpu) -> Mark:
    """Return what marks the section of `op` on a GPU: the GPU, versions, and a hash of sources."""
    versions = {"triton": version(TRITON)}
    if op in ("linear", "attention"):
        versions["torch"] = str(torch.__version__)
    if op == "linear":
        versions["kitchen"] = version(("comfy-kitchen",))
    return {
        "op": op,
        "gpu": gpu.name,
        "capability": "{}.{}".format(*gpu.capability),
        "processors": gpu.processors,
        **versions,
        "source": source_hash(op),
    }


def version(names: Iterable[str]) -> str:
    """Return the version of the first package of these that is installed, else "missing"."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "missing"


@functools.cache
def source_hash(op: str) -> str:
    """Return a hash of our sources that the speed of `op` depends on."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES[op] for file in here.glob(pattern)}):
        # Git may have given the lines other ends.
        text = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(here).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:16]


# torch.compile, which sees through the cache, cannot trace the reading of a file.
@cached
@torch.compiler.assume_constant_result
def stored() -> tuple[tuple[Section, ...], str | None]:
    """Return the sections of the file, and why it cannot be used, which is logged, or None."""
    file = tuning_file.path()
    try:
        return tuple(tuning_file.read(file)), None
    except (UnreadableError, OSError) as error:
        _warn(f"{file}: {error}. It is ignored; `lowbit tune` puts a new one in its place.")
        return (), f"{file}: {error}"


@functools.cache
def _warn(text: str) -> None:
    """Log a warning once."""
    logger.warning("%s", text)


@cached
def lookup(op: str, gpu: Gpu | None) -> Mapping[Key, Entry]:
    """Return the entries of `op` that count on a GPU here and now; None: no GPU, no entries."""
    if gpu is None:
        return {}
    sections, _ = stored()
    wanted = mark(op, gpu) if sections else None
    found = {e.key: e for part in sections if part.mark == wanted for e in part.entries}
    found.update(_used.get((op, gpu), {}))
    return {key: entry for key, entry in found.items() if entry is not None}


@cached
def choices(op: str, gpu: Gpu, read: Callable[[Any], Any]) -> Mapping[Key, Any]:
    """Return what was measured to be faster than the built-in choices of `op` on a GPU.

    read: makes a choice of an entry's, or raises ValueError; such an entry is ignored, and logged.
    """
    found = {}
    for key, entry in lookup(op, gpu).items():
        try:
            found[key] = read(entry.choice)
        except ValueError as error:
            text = "what was tuned of %s for %s is ignored: %s. Run `lowbit tune` again."
            logger.warning(text, op, key, error)
    return found


@cached
def _weights(op: str, gpu: Gpu | None) -> frozenset[tuple[str, int, int]]:
    return frozenset(key[:3] for key in lookup(op, gpu))


def bucket_if_tuned(
    op: str, scheme: str, device: torch.device, n: int, k: int, m: int
) -> int | None:
    """Return the bucket of `m` where an entry is for this weight, whatever its M; else None.

    Where M makes no difference, neither remembered choices nor compiled graphs are to depend on it.
    """
    return bucket(m) if (scheme, n, k) in _weights(op, gpu(device)) else None


def use(op: str, gpu: Gpu, changes: Mapping[Key, Entry | None]) -> None:
    """Have this process take entries as if the file held them; None: as if it held none."""
    _used.setdefault((op, gpu), {}).update(changes)
    forget()


def save(op: str, gpu: Gpu, changes: Mapping[Key, Entry | None]) -> None:
    """Write entries to the file, None: remove. Raises OSError when it cannot be written."""
    tuning_file.update(tuning_file.path(), mark(op, gpu), changes)
    forget()
