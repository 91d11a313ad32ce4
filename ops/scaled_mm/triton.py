"""The Triton backend of `scaled_mm`: how its kernel is launched."""

import functools

import torch

from .. import tuning
from ..launch import ALIGNMENT, TRITON_MIN, alignment, dependent
from ..registry import Backend, Needs, capability, register
from ..replay import empty, launch, replayed
from . import OP
from .check import granularity
from .tiles import Row, Tile, choose

WARP_SIZE = 32
# Columns of a low-rank term that are multiplied at a time: as few as the tensor cores take, and as
# many as leave the pipeline its shared memory.
RANK_MIN, RANK_MAX = 16, 32
# Ranks that flattened INT8 tiles multiply at once, where the shared memory of one of Hopper's
# multiprocessors has room.
WHOLE, SHARED_BYTES = (16, 32, 64), 227 * 1024
# For one scale per block of 128 x 128: BLOCK_K is 128, BLOCK_N divides it. The sum of a block
# stands in registers beside the sum of all: large tiles have twice the warps. Compiled and tested,
# not measured.
BLOCKS_MMA_SYNC = (
    Row((Tile(32, 64, 128, stages=4, per_sm=2),), m_max=32),
    Row((Tile(64, 64, 128, stages=3, per_sm=2),), m_max=128),
    Row((Tile(128, 128, 128, warps=8, stages=3),)),
)
BLOCKS_HOPPER = (
    Row((Tile(16, 32, 128, stages=6, per_sm=4),), m_max=16),
    Row((Tile(32, 32, 128, stages=6, per_sm=3),), m_max=32),
    Row((Tile(64, 128, 128, stages=4, tma=True, per_sm=2),), m_max=512),
    Row((Tile(128, 128, 128, warps=8, stages=4, tma=True),)),
)
# Least compute capability -> rows, in the order in which they are tried.
BLOCK_TABLE = {(8, 0): BLOCKS_MMA_SYNC, (9, 0): BLOCKS_HOPPER, (10, 0): BLOCKS_MMA_SYNC}


@functools.cache
def processors_of(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_for_blocks(has: tuple[int, int], m: int, n: int, k: int, integer: bool) -> Tile:
    """Return the tile for [m, k] times [n, k], one scale per block, on a compute capability."""
    rows = BLOCK_TABLE[max(known for known in BLOCK_TABLE if known <= has)]
    return next(row for row in rows if row.fits(m, n, k, integer)).tiles[0]


@replayed
def run(
    a,
    b,
    scale_a,
    scale_b,
    bias,
    zero_point,
    column_sum,
    activation,
    gate,
    residual,
    out_dtype,
    low_rank=None,
) -> torch.Tensor:
    """Return the product as `scaled_mm` describes it, cut as `tiles.py` says."""
    (m, k), n = a.shape, b.shape[0]
    has, processors, integer = capability(a.device), processors_of(a.device), a.dtype == torch.int8
    if granularity(a, b, scale_a, scale_b) == "block":
        tile = choose_for_blocks(has, m, n, k, integer)
    else:
        # A gate and a residual take registers with which tiles are not tuned.
        known = tuning.gpu(a.device) if gate is None and residual is None else None
        tile = choose(has, processors, m, n, k, integer, out_dtype == torch.float32, known)
    out = empty((m, n), out_dtype, a.device)
    operands = (a, b, scale_a, scale_b, bias, zero_point, column_sum)
    run_tile(out, *operands, tile, processors, activation, gate, residual, low_rank)
    return out


def parts(tile: Tile, activation: str | None, gate_rows: str | None, has_residual: bool) -> int:
    """Return into how many parts a tile is cut for its epilogue.

    A gate per row and a residual are tiles of their own, for which the registers have no room
    beside the sums, and an activation takes some; not so where a thread holds few sums.
    """
    if tile.block_m * tile.block_n <= 32 * WARP_SIZE * tile.warps:
        return 1
    loaded = (gate_rows == "many") + has_residual
    return (4 if activation else 1, 4, 8)[loaded]


def pieces(tile: Tile, integer: bool, tma: bool, rank: int) -> tuple[int, bool]:
    """Return (columns of a low-rank term multiplied at a time, whether loops are flattened).

    0 columns: all at once, with h in registers, in INT8's flattened loops where u [block_n, rank]
    fits in Hopper's shared memory beside the pipeline. FP8 loops are not flattened: between sums
    that the tensor cores work on ahead, another product has them wait (35% slower).
    """
    if not rank:
        return 0, tile.flatten
    pipeline = tile.stages * (tile.block_m + tile.block_n) * tile.block_k
    room = tile.per_sm * (pipeline + 2 * tile.block_n * rank) <= SHARED_BYTES
    if integer and tma and tile.flatten and room and rank in WHOLE:
        return 0, True
    return min(max(1 << (rank - 1).bit_length(), RANK_MIN), RANK_MAX), tile.flatten and integer


@functools.cache
def _imports():
    """Return what needs Triton: the kernel, and the function that describes an operand for TMA."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .kernel import scaled_mm_kernel

    return scaled_mm_kernel, TensorDescriptor.from_tensor


def _class(number: int | None) -> tuple[bool, bool] | None:
    """Return what Triton compiles for, of a number: whether it is 1, and a multiple of 16."""
    return None if number is None else (number == 1, number % ALIGNMENT == 0)


def _dtype(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def run_tile(
    out,
    a,
    b,
    scale_a,
    scale_b,
    bias,
    zero_point,
    column_sum,
    tile: Tile,
    processors: int,
    activation: str | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write the product to `out` [M, N], contiguous, cut into `tile` on so many processors."""
    kernel, describe = _imports()
    (m, k), n = a.shape, b.shape[0]
    # The stride of one row may be anything, which a descriptor does not take.
    a, b = (x if len(x) > 1 or x.stride(0) == k else x.as_strided(x.shape, (k, 1)) for x in (a, b))
    h, u = low_rank or (None, None)
    tensors = (scale_a, scale_b, bias, zero_point, column_sum, gate, residual, h, u)
    aligned = alignment(a, b, *tensors)
    # A weight that is mapped from a file may start anywhere.
    tma = tile.tma and aligned[0] and aligned[1]
    integer, rank = a.dtype == torch.int8, 0 if h is None else h.shape[1]
    piece, flatten = pieces(tile, integer, tma, rank)
    early = dependent(a.device)
    blocks = granularity(a, b, scale_a, scale_b) == "block"
    gate_rows = None if gate is None else "one" if gate.shape[0] == 1 else "many"
    stride_scale = scale_a.stride(0) if blocks else None
    stride_gate = None if gate is None else gate.stride(0)
    stride_residual = None if residual is None else residual.stride(0)
    stride_h, stride_u = (x.stride(0) if rank else None for x in (h, u))
    constants = (
        *(tile.block_m, tile.block_n, tile.block_k, tile.group_m),
        tma,
        integer,
        "block" if blocks else "one" if scale_a.numel() == 1 else "row",
        "block" if blocks else "one" if scale_b.numel() == 1 else "row",
        bias is not None,
        zero_point is not None,
        activation,
        gate_rows,
        residual is not None,
        flatten,
        parts(tile, activation, gate_rows, residual is not None),
        *(rank, piece),
        bool(early),
    )
    arguments = (
        describe(a, (tile.block_m, tile.block_k)) if tma else a,
        describe(b, (tile.block_n, tile.block_k)) if tma else b,
        *(out, *tensors),
        *(m, n, k, a.stride(0), b.stride(0)),
        scale_a.stride(1) if blocks else None,
        None if gate is None else m // gate.shape[0],
        *(stride_scale, stride_gate, stride_residual, stride_h, stride_u),
        *constants,
    )
    types = (a.dtype, b.dtype, out.dtype, _dtype(bias), _dtype(gate), _dtype(residual))
    given = (stride_scale, stride_gate, stride_residual, stride_h, stride_u)
    strides = tuple(_class(stride) for stride in given)
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    launch(
        kernel,
        min(tiles, processors * tile.per_sm),
        arguments,
        {"num_warps": tile.warps, "num_stages": tile.stages, **early},
        (constants, aligned, (*types, _dtype(h)), _class(n), strides),
        a.device,
    )


def _register(operands: set[str], least: tuple[int, int]) -> None:
    needs = Needs(
        frozenset(f"{x}_{scales}" for x in operands for scales in ("tensor", "row", "block")),
        devices=frozenset({"cuda"}),
        capability=least,
        package="triton.tools.tensor_descriptor",
        package_min=TRITON_MIN,
    )
    register(Backend(OP, "triton", 10, needs, run))


_register({"int8"}, (8, 0))
# Triton has no FP8 types below.
_register({"fp8", "fp8_mixed", "fp8_e5m2"}, (8, 9))
