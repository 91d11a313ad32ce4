"""Which tile a product is cut into, as data: by compute capability, size and dtype.

The first row that fits the product gives the candidates; of those, `choose` takes the one that is
expected to end first.
"""

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One way to cut a product, and how fast it was.

    block_m, block_n, block_k: elements. group_m: row tiles that share columns in the L2 cache.
    warps, stages: of Triton. flatten: the loops over tiles and over K become one. tma: operands
    come through TMA descriptors. per_sm: programs on a multiprocessor; where there are two, one
    multiplies while the other writes its result. rate: speed on full multiprocessors, relative to
    the fastest tile of its row.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    warps: int = 4
    stages: int = 3
    flatten: bool = False
    tma: bool = False
    per_sm: int = 1
    rate: float = 1.0


@dataclass(frozen=True)
class Row:
    """The tiles for products of at most this size; integer: of INT8, of FP8, or of both (None)."""

    tiles: tuple[Tile, ...]
    m_max: float = math.inf
    n_max: float = math.inf
    k_max: float = math.inf
    integer: bool | None = None

    def fits(self, m: int, n: int, k: int, integer: bool) -> bool:
        """Return whether the row is for [m, k] times [n, k]."""
        sized = m <= self.m_max and n <= self.n_max and k <= self.k_max
        return sized and self.integer in (integer, None)


# Compiled and tested, not measured: 8.6, 8.9 and 12.0 have 99 KiB of shared memory.
MMA_SYNC = (
    Row((Tile(32, 64, 128, stages=4, per_sm=2),), m_max=32),
    Row((Tile(64, 64, 128, stages=3, per_sm=2),), m_max=128),
    Row((Tile(128, 128, 64, warps=8, stages=3),)),
)
# Two programs a multiprocessor hide the epilogue and beat one with twice the tile (1,476 against
# 1,326 TOPS); with FP8, whose accumulator is added up in registers, they do not.
SHORT = (
    Tile(128, 128, 128, tma=True, per_sm=2),
    Tile(128, 64, 128, tma=True, per_sm=3, rate=0.88),
    Tile(64, 64, 128, stages=4, tma=True, per_sm=3, rate=0.65),
)
HOPPER = (
    # By pointers: a descriptor takes the host longer than so small a product the GPU.
    Row((Tile(16, 32, 256, stages=4, per_sm=4),), m_max=16),
    Row((Tile(32, 32, 256, stages=4, per_sm=3),), m_max=32),
    Row(SHORT, m_max=1024, integer=True),
    Row((Tile(128, 256, 128, 8, 8, 3, tma=True, rate=0.95), *SHORT), m_max=1024, integer=False),
    Row((Tile(128, 128, 128, 8, 4, 3, True, True, 2),), n_max=8192, k_max=8192, integer=True),
    Row((Tile(128, 128, 128, 4, 4, 3, True, True, 2),), integer=True),
    Row(
        (
            Tile(128, 256, 128, 16, 8, 3, True, True),
            Tile(128, 128, 128, 8, 4, 3, True, True, 2, rate=0.9),
        ),
        integer=False,
    ),
)
# Elements of the largest tile with a float32 result.
WIDE_ELEMENTS = 128 * 128
# Least compute capability -> rows, in the order in which they are tried.
TABLE = {(8, 0): MMA_SYNC, (9, 0): HOPPER, (10, 0): MMA_SYNC}


def _time(tile: Tile, m: int, n: int, processors: int) -> float:
    """Return the expected time, in waves of tiles.

    Of a wave that is not full, half of the time is saved that its missing programs would take: one
    program alone does not keep a multiprocessor busy.
    """
    tiles = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
    waves, rest = divmod(tiles, processors * tile.per_sm)
    last = (math.ceil(rest / processors) + tile.per_sm) / 2 if rest else 0
    return (waves * tile.per_sm + last) * tile.block_m * tile.block_n / tile.rate


@functools.cache
def choose(
    capability: tuple[int, int],
    processors: int,
    m: int,
    n: int,
    k: int,
    integer: bool,
    wide: bool = False,
) -> Tile:
    """Return the tile for [m, k] times [n, k] on a GPU with `processors` multiprocessors.

    wide: the result is float32, of which only so much fits in shared memory on its way out.
    """
    rows = TABLE[max(known for known in TABLE if known <= capability)]
    row = next(row for row in rows if row.fits(m, n, k, integer))
    tiles = [t for t in row.tiles if not wide or t.block_m * t.block_n <= WIDE_ELEMENTS]
    return min(tiles, key=lambda tile: _time(tile, m, n, processors))
