"""What `auto` takes for a kind of call, by its number of tokens: as tuned here, or as built in.

What `lowbit tune` stored (`ops/tuning.py`) comes first. An entry's scheme says what hides keys, n
is the number of keys that was measured, k the head size, m the tokens from which on it holds, and
its choice the ways that beat torch's own, the fastest first.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import registry, tuning
from ..registry import Call
from . import KEYS, scheme, ways
from . import OP as ATTENTION
from .check import DTYPES
from .table import AUTO, Row
from .ways import LOWBIT, MASKED, OP, PLAIN, SDPA, bits, prepares

logger = logging.getLogger(__name__)

# Wan's and Qwen-Image's, the one that is measured.
HEAD_SIZE = 128
# The schemes of entries, by what hides keys.
SCHEMES = {None: "unmasked", KEYS: "keys"}
# Its version is in the mark of every entry; that of another package is beside each way.
TRITON = "triton"
BITS_MIN = 8
TUNED, BUILT_IN = "tuned", "built in"


class Start(NamedTuple):
    """What `auto` takes from a number of tokens on: the lesser one of queries and of keys.

    source: TUNED or BUILT_IN.
    """

    tokens_min: int
    way: str
    source: str


@dataclass(frozen=True)
class Ranked:
    """A way that was faster than torch's own attention.

    ms: its time. version: of the package that it needs besides Triton, None where it needs none.
    """

    way: str
    ms: float
    version: str | None


@tuning.cached
def starts(
    device: torch.device,
    head_size: int,
    kind: str | None,
    bits_min: int = 0,
    rotate: bool = False,
    grouped: bool = False,
) -> tuple[Start, ...]:
    """Return what `auto` takes for bf16 and fp16: the first whose tokens a call has, else SDPA.

    Of what was measured here and what is built in the row of more tokens holds, and of as many that
    which was measured here. kind: what hides keys, of `attention`'s KINDS. bits_min: the least bits
    of a way. rotate: none of 8 bits that does not rotate q and k. grouped: k has fewer heads than
    q, as nothing that is measured here.
    """

    def may(way: str) -> bool:
        return bits(way) >= bits_min and (not rotate or prepares(way) or bits(way) == bits(SDPA))

    rows = [*_built_in(device, head_size, kind, may)][::-1]
    if not grouped:
        rows += _tuned(device, head_size, kind, may)
    by_tokens = {row.tokens_min: row for row in rows}
    ordered = [by_tokens[tokens] for tokens in sorted(by_tokens)]
    # Neighbours that are the same as one: each number of tokens is a guard of compiled graphs.
    joined = [b for a, b in itertools.pairwise([None, *ordered]) if a is None or a[1:] != b[1:]]
    return tuple(reversed(joined))


@functools.cache
def tell_of_unmeasured(device: torch.device) -> None:
    """Log, once for each GPU, that `auto` takes nothing there as nothing was measured."""
    if device.type != "cuda" or any(starts(device, HEAD_SIZE, kind) for kind in SCHEMES):
        return
    logger.info(
        "LowBit: attention was not measured on this kind of GPU with these versions, so `auto` "
        "leaves it as it is. `lowbit tune --attention` finds what is the fastest there"
    )


def _tuned(device, head_size, kind, may: Callable[[str], bool]) -> Iterator[Start]:
    """Yield what was stored, the most tokens first."""
    gpu = tuning.gpu(device)
    if gpu is None or kind not in SCHEMES:
        return
    found = tuning.choices(ATTENTION, gpu, from_choice)
    rows = {m: rank for (name, _, k, m), rank in found.items() if _is(name, k, kind, head_size)}
    hides = PLAIN if kind is None else MASKED
    for m in sorted(rows, reverse=True):
        able = (
            ranked.way
            for ranked in rows[m]
            if may(ranked.way)
            and ranked.version == package_version(ranked.way)
            # Both dtypes that `auto` takes have the same needs.
            and ways.unmet(ranked.way, ways.named(DTYPES[0]) + hides, device, head_size) is None
        )
        yield Start(m, next(able, SDPA), TUNED)


def _is(name: str, k: int, kind: str | None, head_size: int) -> bool:
    return name == SCHEMES[kind] and k == head_size


def _built_in(device, head_size, kind, may: Callable[[str], bool]) -> Iterator[Start]:
    for row in AUTO:
        if may(row.way) and kind in row.kinds and fits(row, device, head_size, kind):
            yield Start(row.tokens_min, row.way, BUILT_IN)


def fits(row: Row, device: torch.device, head_size: int, kind: str | None) -> bool:
    """Return whether a row of AUTO has this device and head size, and its kernel runs there."""
    has = registry.capability(device)
    if has is None or not row.capability[0] <= has < row.capability[1]:
        return False
    if head_size not in row.head_sizes:
        return False
    if row.backend is None:
        return ways.unmet(row.way, ways.named(DTYPES[0]), device, head_size) is None
    mode = row.way.removeprefix(LOWBIT)
    call = Call(scheme(mode, kind), device, 0, head_size)
    found = [b for b in registry.backends(ATTENTION) if b.name == row.backend]
    return any(registry.unmet(b.needs, call) is None for b in found)


def package_version(way: str) -> str | None:
    """Return the version of the package that a way needs besides Triton, None without one."""
    packages = {b.needs.package for b in registry.backends(OP) if b.name == way}
    names = sorted(packages - {None, TRITON})
    return tuning.version(names) if names else None


def as_choice(ranking: Sequence[Ranked]) -> list[dict[str, Any]]:
    """Return a ranking as an entry of `lowbit tune` holds it."""
    return [dataclasses.asdict(ranked) for ranked in ranking]


def from_choice(choice: Any) -> tuple[Ranked, ...]:
    """Return the ranking that an entry holds. Raises ValueError when `auto` cannot take it."""
    names = {field.name for field in dataclasses.fields(Ranked)}
    known = {backend.name for backend in registry.backends(OP)}
    if not isinstance(choice, list):
        raise ValueError(f"no ranking of ways: {choice!r}")
    for part in choice:
        if not isinstance(part, dict) or set(part) != names or not _is_ranked(**part, known=known):
            raise ValueError(f"no way of attention: {part!r}")
        if bits(part["way"]) < BITS_MIN:
            raise ValueError(f"{part['way']} has {bits(part['way'])} bits")
    return tuple(Ranked(**part) for part in choice)


def _is_ranked(way: Any, ms: Any, version: Any, known: set[str]) -> bool:
    """Return whether fields of `Ranked`, read from a file, are of their types, and a known way."""
    named = isinstance(way, str) and way in known
    return named and type(ms) in (int, float) and isinstance(version, str | None)
