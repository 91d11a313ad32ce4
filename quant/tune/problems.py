"""What is tuned: the families' layers, a checkpoint's, or those that are named; and attention."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...ops.scaled_mm.check import K_MULTIPLE
from ...ops.tuning import BUCKETS, bucket
from .. import families
from ..checkpoint import open_checkpoint
from ..convert import plan

# Text, time and cross-attention; tokens of a model that no family knows.
FEW_ROWS = (1, 16, 64, 128, 512, 1024)
UNKNOWN_TOKENS = (4096, 8192, 16384, 32768)
# Tokens of attention: texts, of which a video's or image's tokens are the queries, then its own.
TEXT_TOKENS = (512, 1024)
ATTENTION_TOKENS = (*TEXT_TOKENS, 2048, 4096, 8192, 16384, 32768)
QUERIES_OF_TEXT = 8192
# Takes layers of any width.
ANY_WIDTH = "fp8_e4m3"


@dataclass(frozen=True)
class Problem:
    """A linear layer with weight [n, k] and m rows of input."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Attention:
    """Attention of so many queries and keys to each head."""

    queries: int
    keys: int

    @property
    def tokens(self) -> int:
        """The lesser number of both, by which `auto` chooses."""
        return min(self.queries, self.keys)


def of_attention(tokens: Sequence[int] = ()) -> list[Attention]:
    """Return the attentions of so many tokens, or of ATTENTION_TOKENS: as few as a text's to more.

    Raises ValueError where nothing is tuned for so many.
    """
    wanted = sorted({check_rows(count, "tokens") for count in tokens or ATTENTION_TOKENS})
    texts = max(TEXT_TOKENS)
    return [Attention(QUERIES_OF_TEXT if n <= texts else n, n) for n in wanted]


def of_families(rows: Sequence[int] = ()) -> list[Problem]:
    """Return the layers of the families' real models: with their tokens first, then few rows.

    rows: numbers of rows to take instead.
    """
    layers = [
        layer
        for name in families.names()
        for shapes in families.get(name).shapes.values()
        for layer in shapes
    ]
    tokens = [] if rows else [Problem(m, x.N, x.K) for x in layers for m in x.tokens]
    few = [Problem(m, x.N, x.K) for m in rows or FEW_ROWS for x in layers]
    return distinct([*tokens, *few])


def of_checkpoint(path: str | os.PathLike, rows: Sequence[int] = ()) -> list[Problem]:
    """Return the layers of a checkpoint that can be quantized, largest first; reads its header.

    rows: as in `of_families`. Raises CheckpointError when the file cannot be read.
    """
    work = plan(open_checkpoint(path), ANY_WIDTH)
    weights = sorted({step.shape for step in work.layers}, key=lambda s: (-s[0] * s[1], s))
    known = {
        (layer.N, layer.K): layer.tokens
        for shapes in work.model.family.shapes.values()
        for layer in shapes
    }
    tokens = [
        Problem(m, n, k)
        for n, k in weights
        for m in (() if rows else known.get((n, k), UNKNOWN_TOKENS))
    ]
    few = [Problem(m, n, k) for m in rows or FEW_ROWS for n, k in weights]
    return distinct([p for p in (*tokens, *few) if not p.k % K_MULTIPLE])


def named(text: str) -> Problem:
    """Return the problem that "M,N,K" names. Raises ValueError."""
    try:
        m, n, k = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"shape {text!r}: three whole numbers M,N,K are wanted") from error
    if min(m, n, k) < 1 or k % K_MULTIPLE:
        raise ValueError(f"shape {text!r}: M, N, K above zero, K a multiple of {K_MULTIPLE}")
    check_rows(m)
    return Problem(m, n, k)


def check_rows(m: int, what: str = "rows") -> int:
    """Return `m`. Raises ValueError where nothing is tuned for so many rows."""
    if not 1 <= m <= BUCKETS[-1]:
        raise ValueError(f"M={m}: 1 to {BUCKETS[-1]} {what} can be tuned")
    return m


def distinct(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems in their order, of each bucket of M the first."""
    found: dict[tuple[int | None, int, int], Problem] = {}
    for problem in problems:
        found.setdefault((bucket(problem.m), problem.n, problem.k), problem)
    return list(found.values())
