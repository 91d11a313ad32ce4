"""The pre-pass of attention in CUDA C++: Q, K and V to 8 bits, each read from memory once.

But V twice where it becomes integers and the GPU cannot hold a head of it, as all of their range is
used. `prepare.py` says what comes, and has the Triton kernels that do it where this does not fit.
"""

import functools
from pathlib import Path

import torch

from ..cuda import FOLDER, nvrtc
from ..cuda.kernel import CudaKernel
from ..launch import ALIGNMENT
from ..replay import empty, launch
from .modes import Mode
from .prologue import NORMS, NOTHING, TOKEN, Prologue

SOURCES = (FOLDER / "ampere.cu", FOLDER / "vector.cu")
KERNELS = Path(__file__).with_name("kernels")
# Head sizes that there is a kernel for, and that of them whose copies may be swizzled.
WIDTHS, SWIZZLED_WIDTH = (64, 128), 128
# As the sources number them.
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ABSENT = -1
STORED = {None: 0, torch.float8_e4m3fn: 1, torch.int8: 2}
# What is taken off the keys, which the softmax does not see, whatever it is, is about the mean of
# so many at most. It is mostly off by a 27th of the keys' deviation and moves the largest of what
# is rounded by less than 1%.
SAMPLE = 1024
# Tokens of a tile, and of a block of the survey: blocks' means are compared, so that one token far
# away counts for nothing; tiles of V of a block.
TILE, SURVEY_TOKENS, VALUE_TILES = 128, 8, 4
# Heads of Q and of K that an item packs, one after the other, with the same angles.
Q_HEADS, K_HEADS = 5, 3
# Tiles of V that a block holds until its head's range is known, where it has room for so many; with
# fewer it would mostly wait. It waits for so many cycles, about what to pack a head again takes.
LEAST_HELD, MOST_HELD, PATIENCE = 2, 3, 1 << 21
# Of the blocks that the GPU has at once those of a head at most, in quarters: kernels of other
# streams may have some of its multiprocessors, and then a head would be packed again in each call.
MOST_QUARTERS = 3
# Of a block: threads of a channel. Of a multiprocessor: threads of its blocks.
THREADS_PER_CHANNEL, RESIDENT_THREADS = 4, 1024
WARP = 32
# Of shared memory: for sums of what others wrote; and, beside what a block asks for, for what its
# warps tell each other.
SUMS_BYTES, EXCHANGED_BYTES = 8192, 2048
# Of shared memory that the driver has of each block.
DRIVER_BYTES = 1024
# `struct Params`: pointers, then the other fields.
POINTERS, LAYOUT = 29, "9q9i3f"


def source(name: str) -> str:
    """Return the CUDA C++ source of the kernel in a file of `kernels`."""
    paths = (*SOURCES, KERNELS / "tokens.cu", KERNELS / name)
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


SURVEY = CudaKernel("survey", POINTERS, LAYOUT, functools.partial(source, "survey.cu"))
ROWS = CudaKernel("pack_rows", POINTERS, LAYOUT, functools.partial(source, "pack_rows.cu"))
HOLD, SEE, VALUES, FINISH = (
    CudaKernel(name, POINTERS, LAYOUT, functools.partial(source, "pack_values.cu"))
    for name in ("hold_values", "see_values", "pack_values", "finish_values")
)


def count(length: int, step: int = TILE) -> int:
    """Return how many of `step` tokens, of tiles if nothing is said, cover a length."""
    return -(-length // step)


def _aligned(x: torch.Tensor) -> bool:
    """Return whether the rows of x [B, H, L, D] consist of 16 bytes that are aligned."""
    unit = ALIGNMENT // x.element_size()
    rows = all(stride % unit == 0 for stride in x.stride()[:3])
    return x.stride(3) == 1 and rows and x.data_ptr() % ALIGNMENT == 0


def fits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mode: Mode,
    p: Prologue = NOTHING,
    plain: bool = False,
) -> bool:
    """Return whether `run` can do q, k, v and the prologue; v is read where the mode stores it.

    plain: the copies are not swizzled, and 128 keys have one scale.
    """
    if q.device.type != "cuda" or q.shape[3] not in WIDTHS or nvrtc.missing():
        return False
    if q.shape[3] != SWIZZLED_WIDTH and not plain:
        return False
    if p.cos is not None and p.cos.dtype != p.sin.dtype:
        return False
    read = (q, k) if mode.storage is None else (q, k, v)
    steps = (t for t in (p.q_weight, p.k_weight, p.cos, p.sin) if t is not None)
    if not all(map(_aligned, read)) or any(t.data_ptr() % ALIGNMENT for t in steps):
        return False
    room = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    return rows_bytes(q.shape[3], p) + EXCHANGED_BYTES <= room


def rows_bytes(d: int, p: Prologue) -> int:
    """Return the shared memory of a block for Q and K: a tile's angles and a head's rows."""
    angles = 0 if p.cos is None else TILE * d * p.cos.element_size()
    return max(angles + 2 * TILE * d, SUMS_BYTES)


def values_bytes(d: int) -> int:
    """Return the shared memory of a block for V: a tile, and a sum for each of its 16 keys."""
    return max(TILE * d + TILE // 16 * 4 * left_row(d), SUMS_BYTES)


def left_row(d: int) -> int:
    """Return the sums of the channels that 16 keys leave, and how many keep banks apart."""
    return d + 4


def held_bytes(d: int, tiles: int) -> int:
    """Return the shared memory of a block that holds so many tiles of V, and their maxima."""
    return tiles * TILE * d * 2 + 8 * d * 4


@functools.cache
def _held(device: torch.device, d: int) -> int:
    """Return the tiles of V that a block holds, with as many beside it as `_in_flight` says."""
    room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin + DRIVER_BYTES
    of_block = room // (RESIDENT_THREADS // (THREADS_PER_CHANNEL * d)) - DRIVER_BYTES
    fit = (n for n in range(MOST_HELD + 1) if held_bytes(d, n) + EXCHANGED_BYTES <= of_block)
    return max(fit, default=0)


def defined(
    d: int,
    x: torch.dtype,
    p: Prologue,
    mode: Mode,
    groups: int,
    swizzled: bool,
    shift: bool,
    rotate: bool,
) -> tuple[tuple[str, int], ...]:
    """Return the names that tokens.cu wants set, with their values."""

    def code(t: torch.Tensor | None) -> int:
        return ABSENT if t is None else DTYPES[t.dtype]

    def split(t: torch.Tensor | None) -> int:
        return int(t is not None and t.dim() == 2)

    return (
        *(("D", d), ("X", DTYPES[x]), ("NORM", 0 if p.norm is None else 1 + NORMS.index(p.norm))),
        *(("Q_WEIGHT", code(p.q_weight)), ("K_WEIGHT", code(p.k_weight))),
        *(("Q_SPLIT", split(p.q_weight)), ("K_SPLIT", split(p.k_weight))),
        *(("ANGLES", code(p.cos)), ("ROTATE", int(rotate)), ("GROUPS", groups)),
        *(("SWIZZLED", int(swizzled)), ("SHIFT", int(shift)), ("V", STORED[mode.storage])),
        *(("Q_HEADS", Q_HEADS), ("K_HEADS", K_HEADS), ("SAMPLE", SAMPLE)),
        *(("SURVEY_TOKENS", SURVEY_TOKENS), ("VALUE_TILES", VALUE_TILES)),
        *(("RMS_ITEMS", rms_items(d)), ("LEFT_ROW", left_row(d)), ("PATIENCE", PATIENCE)),
    )


def rms_items(d: int) -> int:
    """Return the items of a tile of keys for their norms over all heads, a token for each warp."""
    return TILE * WARP // (THREADS_PER_CHANNEL * d)


@functools.cache
def _in_flight(device: torch.device, d: int) -> int:
    """Return how many blocks are started, each for many items: what the GPU has at once."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * (RESIDENT_THREADS // (THREADS_PER_CHANNEL * d))


def _stream(ahead: int, after: int, units: int, in_flight: int) -> tuple[int, int]:
    """Return the lag and the number of items of a `Stream` of pack_rows.cu.

    ahead, after: items of a unit that are waited for, and that wait. Between the two there are
    others for all blocks.
    """
    lag = min(units, count(in_flight, ahead + after) + 1) if ahead else 0
    return lag, (units + lag) * (ahead + after)


def _made(like: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return empty(shape, dtype, like.device)


def _copies(
    q, k, mode: Mode, groups: int, swizzled: bool, shift: bool
) -> tuple[tuple, tuple, tuple]:
    """Return what is to be of q, k and v, in the order of `struct Params`; None for what is not."""
    (b, h, length, d), (heads, keys) = q.shape, k.shape[1:3]
    tiles, blocks, kv, byte = count(length), count(keys), b * heads, torch.int8
    of_q = (
        *(_made(q, b * h, tiles, TILE, d, dtype=byte), _made(q, b * h, tiles * TILE)),
        *(_made(q, b * h, tiles * TILE), _made(q, b * h, length) if shift else None),
    )
    scales = _made(q, kv, blocks, groups), _made(q, kv, blocks)
    of_k = _made(q, kv, blocks, TILE, d, dtype=byte), *scales
    if mode.storage is None:
        return of_q, of_k, (None,) * 4
    v_tiles = _made(q, kv, blocks, d, TILE, dtype=mode.storage)
    # Hopper's kernel does not read V's sums.
    v_sum = None if swizzled else _made(q, kv, blocks, d)
    return of_q, of_k, (v_tiles, _made(q, kv, d), _made(q, kv, d), v_sum)


def _scratch(q, k, mode: Mode, p: Prologue, surveys: int) -> tuple[torch.Tensor | None, ...]:
    """Return what kernels tell each other, from `sample` on in `struct Params`."""
    (b, h, length, d), (heads, keys) = q.shape, k.shape[1:3]
    tiles, blocks, kv, word = count(length), count(keys), b * heads, torch.int32
    stored, by_token = mode.storage is not None, p.norm == TOKEN
    return (
        *(_made(q, surveys, heads, d), _made(q, kv, d)),
        _made(q, surveys, heads, d) if stored else None,
        _made(q, surveys, 2, heads, d) if stored and mode.storage != torch.int8 else None,
        _made(q, b * tiles, count(h, Q_HEADS), TILE) if by_token else None,
        _made(q, b, keys) if by_token else None,
        _made(q, kv, d) if stored else None,
        _made(q, kv, 2, d, dtype=word) if stored else None,
        _made(q, kv, blocks, d) if stored else None,
        _made(q, kv, dtype=word) if stored else None,
        _made(q, 3 + b * (tiles + blocks), dtype=word),
    )


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    factor: float,
    mode: Mode,
    groups: int,
    swizzled: bool,
    shift: bool,
    p: Prologue,
    rotate: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Return the fields of `prepare.Prepared`, in their order, of what `fits`.

    factor: what the logits are multiplied by, log2(e) among it.
    """
    (b, h, queries, d), (heads, keys) = q.shape, k.shape[1:3]
    kv, blocks, stored = b * heads, count(keys), mode.storage is not None
    surveys, in_flight = b * count(min(keys, SAMPLE), SURVEY_TOKENS), _in_flight(q.device, d)
    of_q, of_k, of_v = _copies(q, k, mode, groups, swizzled, shift)
    norms = rms_items(d) if p.norm == TOKEN else 0
    k_lag, k_items = _stream(norms, count(heads, K_HEADS), b * blocks, in_flight)
    held = _held(q.device, d)
    items = kv * (1 + stored) + b * count(queries) * count(h, Q_HEADS) + k_items
    arguments = (
        *(q, k, v if stored else None, *of_q, *of_k, *of_v),
        *(p.q_weight, p.k_weight, p.cos, p.sin, *_scratch(q, k, mode, p, surveys)),
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        *(b, h, heads, queries, keys, p.first, k_lag, items, held),
        *(factor, mode.limit, p.eps),
    )
    names = defined(d, q.dtype, p, mode, groups, swizzled, shift, rotate)
    # V does not depend on what is done to Q and K: one kernel for all of that.
    alone = defined(d, q.dtype, NOTHING, mode, 1, swizzled, False, False)
    parts, room = kv * count(blocks, VALUE_TILES), values_bytes(d)
    launches = [(SURVEY, surveys, 0, names), (ROWS, min(items, in_flight), rows_bytes(d, p), names)]
    fits_held = held >= LEAST_HELD and 4 * count(blocks, held) <= MOST_QUARTERS * in_flight
    if mode.storage == torch.int8 and fits_held:
        launches.append((HOLD, kv * count(blocks, held), held_bytes(d, held), alone))
    elif stored:
        seen = ((SEE, parts, room, alone),) if mode.storage == torch.int8 else ()
        launches += (*seen, (VALUES, parts, room, alone))
    if stored:
        launches.append((FINISH, kv, room, alone))
    for kernel, programs, room_of, defines in launches:
        sizes = {"threads": THREADS_PER_CHANNEL * d, "shared_bytes": room_of}
        launch(kernel, programs, arguments, {**sizes, "defined": defines}, None, q.device)
    return *of_q[:3], *of_k, *of_v, of_q[3]
