"""What tests of `lowbit tune` measure with: a CPU that passes for a GPU, and made-up times."""

import torch

from lowbit.ops.fp4_mm.choice import Tile as FewTile
from lowbit.ops.scaled_mm import scaled_mm, tiles
from lowbit.ops.scaled_mm.candidates import Limits
from lowbit.ops.scaled_mm.tiles import Tile
from lowbit.ops.tuning import Gpu
from lowbit.quant.tune import PLAIN, Bench

GPU = Gpu("a GPU of tests", (9, 0), 3)
LIMITS = Limits(227 << 10, 228 << 10)
BACKENDS_MS = {"reference": 0.5, "kitchen": 1.0, PLAIN: 0.25}


def made_up_ms(name) -> float:
    """Milliseconds by which no two tiles are equal: wide ones with many stages are fast."""
    if isinstance(name, Tile):
        order = 8 * name.group_m + 4 * name.per_sm + 2 * name.flatten + name.warps / 8
        return (10 / (name.block_n * name.stages)) * (1 + order / 100) + name.block_k * 1e-6
    if isinstance(name, FewTile):
        # Many that share a sum are fast.
        return 10 / (name.block_n * name.stages * name.splits) + name.block_k * 1e-6
    return BACKENDS_MS[name]


def bench(*, ms=made_up_ms, schemes=("int8", "fp8"), formats=(), four_bit=()) -> Bench:
    """Return a bench whose timer runs everything once and says that it took `ms(name)`."""

    def timer(runs, samples):
        for run in runs.values():
            run()
        return {name: [ms(name)] * samples for name in runs}

    return Bench(torch.device("cpu"), GPU, LIMITS, timer, schemes, formats, four_bit)


def by_reference(*, out, a, b, scale_a, scale_b, bias, zero_point, column_sum, tile, processors):
    """Write the product as `run_tile` does, whatever the tile."""
    options = {"zero_point": zero_point, "column_sum": column_sum, "out_dtype": out.dtype}
    out.copy_(scaled_mm(a, b, scale_a, scale_b, bias, backend="reference", **options))


def taken(scheme: str, m: int, n: int, k: int, gpu: Gpu | None = GPU) -> Tile:
    """Return the tile that products take; gpu None: without tuning."""
    return tiles.choose(GPU.capability, GPU.processors, m, n, k, scheme == "int8", gpu=gpu)
