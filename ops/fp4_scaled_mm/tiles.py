"""Which tile the Hopper kernel cuts a product into, as data."""

import functools
import math
from dataclasses import dataclass

# So many are multiplied here at most where `auto` decides: so it was the fastest on an H200.
MOST_TOKENS = 1536
# Of a multiprocessor, less what a block of threads has beside its stages.
SHARED_BYTES, BESIDE_BYTES = 228 * 1024, 5 * 1024
STAGES_MAX = 8
ROWS_OF_GROUP = 64
# Columns of a stage, and its bytes: of a token, of a row of packed weight, of the scales of 128
# rows.
COLUMNS = 128
TOKEN_BYTES, ROW_BYTES, SCALE_BYTES = 128, 64, 1024


@dataclass(frozen=True)
class Tile:
    """One way to cut a product.

    groups: of 64 outputs. tokens: of a tile. parts: blocks of threads, 1 or 2, that have it
    together, each a part of the columns. turns: warpgroups, 1 or 2, of each group, that take stages
    in turn.
    """

    groups: int
    tokens: int
    parts: int = 1
    turns: int = 1

    @property
    def rows(self) -> int:
        """Outputs."""
        return ROWS_OF_GROUP * self.groups

    @property
    def stage_bytes(self) -> int:
        """Shared memory of 128 columns."""
        scales = SCALE_BYTES * (1 if self.groups <= 2 else 2)
        return TOKEN_BYTES * self.tokens + ROW_BYTES * self.rows + scales

    @property
    def stages(self) -> int:
        """Blocks of 128 columns that are in shared memory."""
        room = SHARED_BYTES - BESIDE_BYTES - self._sums_bytes
        stages = min(room // self.stage_bytes, STAGES_MAX)
        # A place in the ring is always one warpgroup's: it could not tell apart two fills of a
        # place of which another one awaits the first.
        return stages - stages % self.turns

    @property
    def shared_bytes(self) -> int:
        """Shared memory of all stages, and of the sums that come from the other block."""
        return self.stages * self.stage_bytes + self._sums_bytes

    @property
    def _sums_bytes(self) -> int:
        return 0 if self.parts == 1 else 4 * self.rows * self.tokens // self.parts


TILES = tuple(
    Tile(groups, tokens, parts, turns)
    for groups in (1, 2, 3)
    for tokens in (64, 96, 128, 160, 176, 192, 224, 256)
    for parts, turns in ((1, 1), (2, 1), (1, 2))
    # More sums than registers; stores take sixteen tokens at a time.
    if (groups < 3 or tokens <= 192) and tokens % (16 * parts * turns) == 0
    if turns == 1 or groups == 1
)
# Units of a 1.8 GHz cycle, fitted to 48 products on an H200, where they give the fastest of the
# tiles that were measured: a stage that a warpgroup decodes and multiplies; what a token adds;
# what a warpgroup waits that is alone; what comes before the first stage and after the last.
DECODED, WITH_TOKEN, ALONE, ENDS = 222.3, 1.584, 117.4, 6520
# By 18 products more, for two blocks that have a tile together: how much longer a stage of theirs
# takes, and what each sum of the tile adds.
STAGE_OF_TWO, ADDED = 1.15, 0.2
# By 13 more, for two warpgroups that take stages in turn: what is waited in a stage, and what each
# sum of the tile adds.
IN_TURN, EXCHANGED = 60, 0.08


@functools.lru_cache(maxsize=4096)
def choose(processors: int, tokens: int, rows: int, columns: int) -> Tile:
    """Return the tile that is expected to end first, on so many multiprocessors."""
    return min(TILES, key=lambda tile: cycles(tile, processors, tokens, rows, columns))


def cycles(tile: Tile, processors: int, tokens: int, rows: int, columns: int) -> float:
    """Return the expected time of a product."""
    stage = tile.groups * (DECODED + WITH_TOKEN * tile.tokens)
    if tile.groups == 1:
        stage += ALONE if tile.turns == 1 else IN_TURN
    count = math.ceil(tokens / tile.tokens) * math.ceil(rows / tile.rows)
    ends = ENDS
    if tile.parts > 1:
        stage, ends = stage * STAGE_OF_TWO, ENDS + ADDED * tile.rows * tile.tokens
    if tile.turns > 1:
        ends += EXCHANGED * tile.rows * tile.tokens
    waves = math.ceil(count / (processors // tile.parts))
    return waves * (math.ceil(columns / COLUMNS / tile.parts) * stage + ends)
