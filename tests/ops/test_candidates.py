"""The tiles that tuning tries."""

import dataclasses

import pytest

from lowbit.ops.scaled_mm import candidates as module
from lowbit.ops.scaled_mm.candidates import Limits, candidates, neighbours
from lowbit.ops.scaled_mm.tiles import TABLE, Tile, as_choice, choose, from_choice

# Shared memory of a program and of a multiprocessor, in KiB.
KIB = {(8, 0): (163, 164), (8, 9): (99, 100), (9, 0): (227, 228), (12, 0): (99, 100)}
ROWS = (1, 16, 17, 64, 200, 512, 1024, 4096, 131_072)


def limits(capability) -> Limits:
    return Limits(*(size << 10 for size in KIB[capability]))


@pytest.mark.parametrize("capability", KIB)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("integer", [True, False])
def test_there_are_some_each_once_and_all_can_be_stored(capability, m, integer):
    found = candidates(capability, limits(capability), m, integer)
    assert 10 <= len(found) <= 50
    assert len(set(found)) == len(found)
    assert all(from_choice(as_choice(tile)) == tile for tile in found)


@pytest.mark.parametrize("capability", KIB)
@pytest.mark.parametrize("m", ROWS)
def test_the_tables_choice_is_the_first_or_near(capability, m):
    """So that it is tried where the time does not suffice for all."""
    found = candidates(capability, limits(capability), m, True)
    chosen = choose(capability, 128, m, 3072, 3072, True)
    in_table = sum(len(row.tiles) for row in TABLE[max(c for c in TABLE if c <= capability)])
    assert dataclasses.replace(chosen, rate=1.0) in found[:in_table]


@pytest.mark.parametrize("capability", KIB)
def test_grid_keeps_within_shared_memory_and_registers(capability):
    for grid in module.GRIDS[max(known for known in module.GRIDS if known <= capability)]:
        kept = [t for t in grid.tiles() if module.fits(t, capability, limits(capability))]
        for tile in kept:
            shared = module.shared_bytes(tile, capability)
            assert shared <= KIB[capability][0] << 10
            assert shared * tile.per_sm <= KIB[capability][1] << 10
            threads = tile.warps * module.WARP_SIZE
            assert tile.block_m * tile.block_n <= 128 * threads


def test_less_shared_memory_leaves_fewer():
    many, few = (candidates((8, 0), limits(c), 4096, True) for c in ((8, 0), (8, 9)))
    assert set(few) < set(many)


def test_pipeline_holds_what_is_multiplied_only_where_it_is_read_there():
    tile = Tile(64, 64, 128, stages=4)
    assert module.shared_bytes(tile, (9, 0)) == 4 * 128 * 128
    assert module.shared_bytes(tile, (8, 9)) == 3 * 128 * 128
    assert module.shared_bytes(dataclasses.replace(tile, block_m=32), (9, 0)) == 3 * 96 * 128


def test_tma_is_for_gpus_that_have_it():
    for capability in ((8, 0), (8, 9)):
        for m in ROWS:
            assert not any(t.tma for t in candidates(capability, limits(capability), m, True))


def test_neighbours_differ_in_order_alone():
    tile = Tile(128, 128, 128, group_m=8)
    found = neighbours(tile, 4096)
    assert tile not in found and len(found) == len(set(found)) == 7
    for other in found:
        assert dataclasses.replace(other, group_m=8, flatten=False) == tile


def test_one_row_of_tiles_has_no_groups():
    assert neighbours(Tile(128, 128, 128), 100) == (Tile(128, 128, 128, flatten=True),)
