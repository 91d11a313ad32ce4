"""How a W4A16 product is cut: what `lowbit tune` measured here, and the tiles that it tries.

There are two ways: a kernel that decodes as it multiplies (`Tile`), for few tokens, and the
8-bit product's kernel on a decoded weight (`scaled_mm`'s `Tile`), for many.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from .. import tuning
from ..decode_fp4.triton import WORD
from ..scaled_mm import candidates as of_product
from ..scaled_mm import tiles
from ..scaled_mm.candidates import Limits
from . import OP


@dataclass(frozen=True)
class Tile:
    """One way to cut a product: tokens, outputs and inputs of a tile, and how many share a sum.

    splits: programs that each have a part of K, whose sums a second kernel adds up. warps, stages:
    of Triton.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 4
    splits: int = 8

    def __str__(self) -> str:
        """Return the tile in short: sizes, warps, stages, splits."""
        sizes = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{sizes} w{self.warps} s{self.stages} k{self.splits} decoding"


# Tokens at most -> tile: eight programs share a sum, since one output tile for a few tokens keeps
# no multiprocessor busy. Measured on an H200, against 26 others.
FEW = {
    16: Tile(16, 64, 128),
    32: Tile(32, 64, 128),
    64: Tile(64, 64, 128, stages=3, splits=4),
    128: Tile(128, 64, 64),
}
# Of the decoded weight, [N, K] in 16 bits: tokens at most -> tile. The last one is as fast as
# cuBLAS on an H200 from 32,760 tokens on.
MANY = {
    1024: tiles.Tile(128, 128, 64, stages=3, tma=True, per_sm=2),
    1 << 62: tiles.Tile(128, 128, 64, stages=3, flatten=True, tma=True, per_sm=2),
}
# Tokens from which on a decoded weight is tried too, and up to which the other kernel is.
DECODED_FROM, FEW_UP_TO = 65, 128
SPLITS = (1, 2, 4, 8, 16)
# Of a decoded weight: (rows, columns, K) of a tile, and warps.
SIZES = (
    *(((64, 64, 64), 4), ((64, 128, 64), 4), ((64, 256, 64), 4)),
    *(((128, 64, 64), 4), ((128, 128, 64), 4), ((128, 128, 64), 8)),
    *(((128, 256, 64), 8), ((256, 128, 64), 8)),
)
ELEMENT_BYTES = 2
AnyTile = Tile | tiles.Tile


def default_tile(m: int, group: int, capability: tuple[int, int]) -> AnyTile:
    """Return the built-in tile for m tokens."""
    if m <= max(FEW):
        return few_tile(m, group)
    tile = next(tile for tokens, tile in MANY.items() if m <= tokens)
    # There are no descriptors before.
    return tile if capability >= (9, 0) else dataclasses.replace(tile, tma=False)


def few_tile(m: int, group: int) -> Tile:
    """Return the tile for m tokens that is as wide as the columns of a word of scales at least."""
    tiles_of_group = [tile for tile in FEW.values() if tile.block_k >= WORD * group]
    return next((tile for tile in tiles_of_group if m <= tile.block_m), tiles_of_group[-1])


def as_choice(tile: AnyTile) -> dict[str, Any]:
    """Return a tile as the entries of `lowbit tune` hold it; either kind has names of its own."""
    return dataclasses.asdict(tile) if isinstance(tile, Tile) else tiles.as_choice(tile)


def from_choice(choice: Any) -> AnyTile:
    """Return the tile that an entry holds. Raises ValueError when it is none that can be run."""
    names = {field.name for field in dataclasses.fields(Tile)}
    if not isinstance(choice, dict) or set(choice) != names:
        return tiles.from_choice(choice)
    sizes = [choice[name] for name in ("block_m", "block_n", "block_k")]
    typed = all(type(value) is int for value in choice.values())
    if not typed or any(size not in (16, 32, 64, 128, 256, 512) for size in sizes):
        raise ValueError(f"no tile: {choice!r}")
    if choice["warps"] not in (1, 2, 4, 8, 16) or min(choice["stages"], choice["splits"]) < 1:
        raise ValueError(f"no tile: {choice!r}")
    return Tile(**choice)


def choose(gpu: tuning.Gpu, scheme: str, m: int, n: int, k: int, group: int) -> AnyTile:
    """Return the tile for m tokens and a weight [n, k] of a scheme: tuned here, or the built-in."""
    tuned = tuning.choices(OP, gpu, from_choice).get((scheme, n, k, tuning.bucket(m)))
    return tuned or default_tile(m, group, gpu.capability)


def candidates(
    capability: tuple[int, int], limits: Limits, m: int, group: int
) -> tuple[AnyTile, ...]:
    """Return the tiles to try for m tokens, those that fit in shared memory, each once."""
    found: list[AnyTile] = []
    if m <= FEW_UP_TO:
        found += _few(limits, m, group)
    if m >= DECODED_FROM:
        found += _decoded(capability, limits, m)
    return tuple(dict.fromkeys(found))


def _few(limits: Limits, m: int, group: int) -> list[Tile]:
    rows = min(size for size in FEW if m <= size)
    tried = itertools.product((64, 128), (64, 128, 256), (3, 4), SPLITS)
    return [
        Tile(rows, columns, depth, 4 if columns == 64 else 8, stages, splits)
        for columns, depth, stages, splits in tried
        # As wide as the columns of a word of scales at least.
        if depth >= WORD * group
        and stages * depth * (rows * ELEMENT_BYTES + columns // 2) <= limits.program_bytes
    ]


def _decoded(capability: tuple[int, int], limits: Limits, m: int) -> list[tiles.Tile]:
    # There are no descriptors before.
    tma = capability >= (9, 0)
    tried = itertools.product(SIZES, (3, 4), (1, 2), (False, True))
    found = [
        tiles.Tile(*size, warps=warps, stages=stages, per_sm=per_sm, flatten=flatten, tma=tma)
        for (size, warps), stages, per_sm, flatten in tried
        if size[0] < 2 * m
    ]
    # The limits are for elements of one byte.
    wide = {tile: dataclasses.replace(tile, block_k=ELEMENT_BYTES * tile.block_k) for tile in found}
    return [tile for tile in found if of_product.fits(wide[tile], capability, limits)]
