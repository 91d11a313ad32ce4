"""The tiles that `lowbit tune` tries for a product, as data: the table's, then a grid's."""

import dataclasses
import itertools
import math
from dataclasses import dataclass

from .tiles import Tile, rows_of

WARP_SIZE = 32
# 32-bit registers of a multiprocessor; of a thread, those that may hold sums; and those that it
# needs beside them, about.
REGISTERS = 65536
MAX_SUMS = 128
OTHER_REGISTERS = 40
# Generations whose tensor cores read shared memory themselves, from so many rows on: there a stage
# of the pipeline stays in use while it is multiplied.
READ_SHARED = (9, 10)
READ_SHARED_ROWS = 64
GROUPS = (1, 4, 8, 16)


@dataclass(frozen=True)
class Limits:
    """Shared memory in bytes: of a program at most, and of a multiprocessor."""

    program_bytes: int
    processor_bytes: int


@dataclass(frozen=True)
class Grid:
    """Tiles for products of at most m_max rows: all combinations. sizes: (rows, columns, K).

    Only the grids of the least m_max that holds a product's rows are tried for it.
    """

    m_max: float
    sizes: tuple[tuple[int, int, int], ...]
    stages: tuple[int, ...]
    warps: tuple[int, ...] = (4,)
    per_sm: tuple[int, ...] = (1, 2)
    tma: bool = False

    def tiles(self) -> list[Tile]:
        """Return every combination."""
        combinations = itertools.product(self.sizes, self.warps, self.stages, self.per_sm)
        return [
            Tile(*size, warps=warps, stages=stages, per_sm=per_sm, tma=self.tma)
            for size, warps, stages, per_sm in combinations
        ]


FEW = (
    Grid(16, ((16, 32, 128), (16, 64, 128), (16, 128, 128)), (3, 4, 5), per_sm=(2, 4)),
    Grid(16, ((16, 32, 256), (16, 64, 256), (16, 32, 512)), (3, 4), per_sm=(2, 4)),
    Grid(32, ((32, 32, 128), (32, 64, 128), (32, 128, 128)), (3, 4, 5), per_sm=(2, 4)),
    Grid(32, ((32, 32, 256), (32, 64, 256)), (3, 4), per_sm=(2, 4)),
)
MMA_SYNC = (
    *FEW,
    Grid(256, ((32, 64, 128), (64, 32, 128), (64, 64, 128), (64, 128, 128)), (3, 4)),
    Grid(1024, ((64, 64, 128), (64, 128, 64), (64, 128, 128), (128, 64, 128)), (3, 4, 5)),
    Grid(1024, ((128, 128, 64),), (3, 4, 5), warps=(4, 8)),
    Grid(math.inf, ((128, 128, 64), (128, 128, 128)), (3, 4, 5), warps=(4, 8)),
    Grid(math.inf, ((128, 256, 64), (256, 128, 64)), (3, 4), warps=(8,)),
)
TMA_FEW = (
    *FEW,
    Grid(256, ((64, 32, 128), (64, 64, 256)), (3, 4, 5), per_sm=(1, 2, 3), tma=True),
    Grid(1024, ((64, 64, 128), (128, 64, 128)), (3, 4, 5), per_sm=(1, 2, 3), tma=True),
    Grid(1024, ((64, 128, 128), (128, 128, 128)), (3, 4), tma=True),
)
HOPPER = (
    *TMA_FEW,
    Grid(math.inf, ((128, 128, 128), (256, 128, 128)), (3, 4), warps=(4, 8), tma=True),
    Grid(math.inf, ((128, 256, 128), (128, 256, 64), (128, 128, 64)), (3, 4), (8,), tma=True),
)
BLACKWELL = (
    *TMA_FEW,
    Grid(math.inf, ((128, 128, 128), (128, 256, 128)), (3, 4), warps=(4, 8), tma=True),
    Grid(math.inf, ((128, 128, 64), (128, 128, 128)), (3, 4, 5), warps=(8,)),
)
# Least compute capability -> grids.
GRIDS = {(8, 0): MMA_SYNC, (9, 0): HOPPER, (10, 0): BLACKWELL, (12, 0): MMA_SYNC}


def shared_bytes(tile: Tile, capability: tuple[int, int]) -> int:
    """Return the least shared memory in bytes that the pipeline of a tile takes."""
    read_there = capability[0] in READ_SHARED and tile.block_m >= READ_SHARED_ROWS
    stages = tile.stages if read_there else max(tile.stages - 1, 1)
    return stages * (tile.block_m + tile.block_n) * tile.block_k


def fits(tile: Tile, capability: tuple[int, int], limits: Limits) -> bool:
    """Return whether a tile is worth compiling: by shared memory, registers, and sums a thread."""
    shared = shared_bytes(tile, capability)
    if shared > limits.program_bytes or shared * tile.per_sm > limits.processor_bytes:
        return False
    threads = tile.warps * WARP_SIZE
    sums = tile.block_m * tile.block_n // threads
    return sums <= MAX_SUMS and tile.per_sm * threads * (sums + OTHER_REGISTERS) <= REGISTERS


def candidates(
    capability: tuple[int, int], limits: Limits, m: int, integer: bool
) -> tuple[Tile, ...]:
    """Return the tiles to try for m rows: the table's first, then the grid's, each once."""
    table = [
        tile
        for row in rows_of(capability)
        if row.integer in (integer, None)
        for tile in row.tiles
        if tile.block_m < 2 * max(m, 16)
    ]
    grids = GRIDS[max(known for known in GRIDS if known <= capability)]
    m_max = min(grid.m_max for grid in grids if m <= grid.m_max)
    tried = [tile for grid in grids if grid.m_max == m_max for tile in grid.tiles()]
    grid = [tile for tile in tried if fits(tile, capability, limits)]
    # A rate is what the table expects, not what is run.
    return tuple(dict.fromkeys(dataclasses.replace(tile, rate=1.0) for tile in (*table, *grid)))


def neighbours(tile: Tile, m: int) -> tuple[Tile, ...]:
    """Return the tiles that differ in order and in how the loops are written, not in size."""
    groups = GROUPS if m > tile.block_m else (tile.group_m,)
    found = [
        dataclasses.replace(tile, group_m=group, flatten=flatten)
        for group in groups
        for flatten in (False, True)
    ]
    return tuple(other for other in found if other != tile)
