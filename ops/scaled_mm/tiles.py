"""Which tile a product is cut into, as data: by compute capability, size and dtype.

What `lowbit tune` measured on the GPU at hand comes first. Without that, the first row of the table
that fits the product gives the candidates; of those, `choose` takes the one that is expected to end
first.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .. import tuning
from . import OP

RATE = "rate"


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

    def __str__(self) -> str:
        """Return the tile in short: sizes, warps, stages, group, programs, flags."""
        sizes = f"{self.block_m}x{self.block_n}x{self.block_k}"
        flags = f"{' flatten' * self.flatten}{' tma' * self.tma}"
        return f"{sizes} w{self.warps} s{self.stages} g{self.group_m} p{self.per_sm}{flags}"


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


# Not measured: 8.0 (163 KiB of shared memory). Sizes as vLLM has them for CUTLASS:
# csrc/quantization/cutlass_w8a8/scaled_mm_c2x_sm80_dispatch.cuh at 0c790eb.
AMPERE = (
    Row((Tile(16, 64, 128, stages=5, per_sm=2),), m_max=16),
    Row((Tile(32, 64, 128, stages=5, per_sm=2),), m_max=32),
    Row((Tile(64, 128, 128, stages=4),), m_max=128),
    Row((Tile(128, 128, 64, warps=8, stages=5),)),
)
# Not measured: 8.6, 8.9 and 12.0 (99 KiB). As scaled_mm_c2x_sm89_{int8,fp8}_dispatch.cuh, beside
# that, at c45614b and 51cccd6; with 8 warps, as 4 spill registers on 12.0.
GEFORCE = (
    Row((Tile(16, 64, 128, stages=4, per_sm=2),), m_max=16),
    Row((Tile(32, 64, 128, stages=4, per_sm=2),), m_max=32),
    Row((Tile(64, 64, 128, stages=4, per_sm=2),), m_max=64),
    Row((Tile(64, 128, 128, stages=3, per_sm=2),), m_max=256),
    Row((Tile(128, 128, 64, warps=8, stages=4, per_sm=2),)),
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
    # The first matrices of LoRAs, one or three below each other: reading a is all that they cost.
    Row((Tile(128, 64, 128, 1, stages=4, tma=True, per_sm=2),), n_max=192),
    Row((Tile(128, 128, 128, 8, 4, 3, True, True, 2),), m_max=8192, integer=True),
    Row((Tile(128, 128, 128, 16, 4, 3, True, True, 2),), integer=True),
    Row(
        (
            Tile(128, 256, 128, 16, 8, 3, True, True),
            Tile(128, 128, 128, 8, 4, 3, True, True, 2, rate=0.9),
        ),
        integer=False,
    ),
)
# Not measured: 10.0 (227 KiB). Triton has no INT8 for its tensor cores but mma.sync; FP8 goes to
# tcgen05 from 64 rows on, with 8 warps, as 4 spill registers.
BLACKWELL = (
    *(row for row in AMPERE if row.m_max <= 32),
    Row((Tile(64, 128, 128, stages=4, tma=True),), m_max=128, integer=False),
    Row((Tile(128, 128, 128, warps=8, stages=3, tma=True, per_sm=2),), integer=False),
    *(row for row in AMPERE if row.m_max > 32),
)
# Elements of the largest tile with a float32 result.
WIDE_ELEMENTS = 128 * 128
# Least compute capability -> rows, in the order in which they are tried.
TABLE = {(8, 0): AMPERE, (8, 6): GEFORCE, (9, 0): HOPPER, (10, 0): BLACKWELL, (12, 0): GEFORCE}


def scheme(integer: bool) -> str:
    """Return the name of an operand type, as backends register it."""
    return "int8" if integer else "fp8"


def rows_of(capability: tuple[int, int]) -> tuple[Row, ...]:
    """Return the rows of the table for a compute capability."""
    return TABLE[max(known for known in TABLE if known <= capability)]


def as_choice(tile: Tile) -> dict[str, Any]:
    """Return a tile as the entries of `lowbit tune` hold it."""
    return {name: value for name, value in asdict(tile).items() if name != RATE}


def from_choice(choice: Any) -> Tile:
    """Return the tile that an entry holds. Raises ValueError when it is none that can be run."""
    kinds = {field.name: type(field.default) for field in fields(Tile) if field.name != RATE}
    kinds |= dict.fromkeys(("block_m", "block_n", "block_k"), int)
    if not isinstance(choice, dict) or set(choice) != set(kinds):
        raise ValueError(f"a tile has {', '.join(kinds)}, not {choice!r}")
    tile = Tile(**choice)
    blocks = (tile.block_m, tile.block_n, tile.block_k)
    typed = all(type(choice[name]) is kind for name, kind in kinds.items())
    # Smaller blocks are none of the tensor cores', larger ones fit in no shared memory.
    if not typed or any(b not in (16, 32, 64, 128, 256, 512) for b in blocks):
        raise ValueError(f"no tile: {choice!r}")
    if tile.warps not in (1, 2, 4, 8, 16) or min(tile.group_m, tile.stages, tile.per_sm) < 1:
        raise ValueError(f"no tile: {choice!r}")
    return tile


def _time(tile: Tile, m: int, n: int, processors: int) -> float:
    """Return the expected time, in waves of tiles.

    Of a wave that is not full, half of the time is saved that its missing programs would take: one
    program alone does not keep a multiprocessor busy.
    """
    tiles = math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n)
    waves, rest = divmod(tiles, processors * tile.per_sm)
    last = (math.ceil(rest / processors) + tile.per_sm) / 2 if rest else 0
    return (waves * tile.per_sm + last) * tile.block_m * tile.block_n / tile.rate


@tuning.cached
def choose(
    capability: tuple[int, int],
    processors: int,
    m: int,
    n: int,
    k: int,
    integer: bool,
    wide: bool = False,
    gpu: tuning.Gpu | None = None,
) -> Tile:
    """Return the tile for [m, k] times [n, k] on a GPU with `processors` multiprocessors.

    wide: the result is float32, of which only so much fits in shared memory on its way out. gpu:
    whose tuned tiles come first; None: the table alone.
    """
    key = (scheme(integer), n, k, tuning.bucket(m))
    tuned = tuning.choices(OP, gpu, from_choice).get(key) if gpu else None
    if tuned and fits(tuned, wide):
        return tuned
    row = next(row for row in rows_of(capability) if row.fits(m, n, k, integer))
    tiles = [tile for tile in row.tiles if fits(tile, wide)]
    return min(tiles, key=lambda tile: _time(tile, m, n, processors))


def fits(tile: Tile, wide: bool) -> bool:
    """Return whether a tile is one for a float32 result (wide), or for any other."""
    return not wide or tile.block_m * tile.block_n <= WIDE_ELEMENTS
