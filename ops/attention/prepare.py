"""Q, K and V as the kernels of `attention` read them: in 8 bits, in tiles of 128 tokens."""

import functools
import math
from dataclasses import dataclass

import torch

from ..launch import ALIGNMENT, alignment
from ..replay import empty, launch, replayed
from . import prepass
from .modes import MODES, Mode
from .prologue import NORMS, NOTHING, TOKEN, Prologue, of_arguments

TILE = 128
# Elements of Q of one program, of one warp: its threads exchange data without waiting for others.
Q_ELEMENTS = 2048
THREADS_OF_WARP = 32
# Of a program of 128 keys, measured fastest on an H200; also with a prologue or rotated, where each
# thread has a row and some of its numbers spill. Else neighbouring threads have a row's chunks.
K_WARPS = 4
# For heads wider than this, or where channels lie apart: fewer do not have the registers.
MANY_CHANNELS, MORE_WARPS = 128, 8
# Keys that one program of the statistics adds up, its warps, and its stages.
CHUNK_KEYS, CHUNK_WARPS, CHUNK_STAGES = 512, 4, 4
# Chunks that are read together to be added up.
TOGETHER = 16
# Channels of a program of V, and its warps.
V_CHANNELS, V_WARPS = 64, 4
# Blocks, and channels, of one step and program that adds up what is stored of V.
OFFSET_ROWS, OFFSET_COLUMNS = 32, 32
# Tokens whose norm over all heads one program takes.
NORM_ROWS = 16
LOG2E = math.log2(math.e)
MIN_WIDTH = 64


def q_rows(w: int, rotate: bool) -> int:
    """Return the rows of a program of Q, [rows, w]. Rotated, each thread has one or more, whole."""
    return max(Q_ELEMENTS // w, THREADS_OF_WARP if rotate else 1)


def k_warps(w: int, stride: int, spread: bool) -> int:
    """Return the warps of a program of K, w channels `stride` apart. spread: as in the kernel."""
    return MORE_WARPS if spread and (w > MANY_CHANNELS or stride != 1) else K_WARPS


def options(warps: int) -> dict[str, int]:
    """Return Triton's options for a kernel of so many warps.

    A product and a sum rounded as one would round to other codes than the reference's.
    """
    return {"num_warps": warps, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Prepared:
    """8-bit copies and scales. H, Hkv heads; tiles and blocks of 128 queries and keys; W width.

    q: [B·H, tiles, 128, W] int8. q_scale: [B·H, tiles · 128], the softmax scale and log2(e)
    included. q_bound: norms of the stored rows, scaled. k: [B·Hkv, blocks, 128, W] int8. k_scale:
    [B·Hkv, blocks, groups]. k_bound: [B·Hkv, blocks], largest norms, scaled. v: [B·Hkv, blocks, W,
    128], or None where the mode reads V as it came; v_scale, v_offset: [B·Hkv, W], v ≈ stored ·
    scale + offset, the mean kept exactly; v_sum: [B·Hkv, blocks, W], sums of the stored numbers, or
    None for Hopper, which does not read them.
    shift: [B·H, Lq], what the logits lost with the mean key, or None.
    """

    q: torch.Tensor
    q_scale: torch.Tensor
    q_bound: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    k_bound: torch.Tensor
    v: torch.Tensor | None
    v_scale: torch.Tensor | None
    v_offset: torch.Tensor | None
    v_sum: torch.Tensor | None
    shift: torch.Tensor | None


@functools.cache
def width(d: int) -> int:
    """Return the padded head size: a power of two, at least 64."""
    return max(MIN_WIDTH, 1 << (d - 1).bit_length())


def count(length: int) -> int:
    """Return the number of tiles of 128 that cover `length` tokens."""
    return -(-length // TILE)


def _key(*values: int) -> tuple:
    """Return what Triton's code depends on of integers: whether 1, divisible by 16, of 64 bits."""
    return tuple((value == 1, value % ALIGNMENT == 0, value >= 2**31) for value in values)


# What a prologue is to the kernels that read q or k, in their order: `inverse_rms` or None, weight,
# cos, sin; its `first` and `eps`; their number of the norm, whether the weight has two rows.
NO_STEPS = (None, None, None, None, 0, 0.0, 0, False)


def _code_of(steps: tuple) -> tuple:
    """Return what Triton's code depends on of the steps of a prologue."""
    tensors = steps[:4]
    types = tuple(None if t is None else t.dtype for t in tensors)
    return types, alignment(*tensors), _key(steps[4]), steps[6:]


def prepare(
    q,
    k,
    v,
    scale: float,
    mode: Mode,
    groups: int,
    swizzled: bool,
    shift: bool,
    prologue: Prologue = NOTHING,
    rotate: bool = False,
) -> Prepared:
    """Return the copies of q [B, H, Lq, D] and k, v [B, Hkv, Lk, D], of any strides.

    scale: of the softmax. groups: scales of 128 keys, 4 (of keys whose (key % 8) / 2 is the same)
    or 1. swizzled: as the Hopper kernel reads them. shift: also what the log-sum-exp needs.
    prologue: what is done to q and k before. rotate: both are multiplied by a Hadamard matrix.
    """
    steps = prologue.arguments
    return Prepared(*_prepared(q, k, v, scale, mode.name, groups, swizzled, shift, rotate, *steps))


@replayed
def _prepared(q, k, v, scale, mode: str, groups, swizzled, shift, rotate, *steps) -> tuple:
    """Return the fields of `Prepared`; steps: the arguments of a prologue."""
    mode, prologue = MODES[mode], of_arguments(*steps)
    if prepass.fits(q, k, v, mode, prologue, plain=groups == 1 and not swizzled):
        given = scale * LOG2E, mode, groups, swizzled, shift, prologue, rotate
        return prepass.run(q, k, v, *given)
    steps = _steps(prologue, "k", k)
    k_mean = _center(k, steps)
    keys = _keys(k, k_mean, steps, groups, swizzled, rotate)
    steps = _steps(prologue, "q", q)
    *queries, shifts = _queries(q, k_mean, steps, scale, k.shape[1], swizzled, shift, rotate)
    values = (None, None, None, None)
    if mode.storage is not None:
        values = _values(v, *_statistics(v, mode.limit), mode.storage, swizzled)
    return *queries, *keys, *values, shifts


def _steps(prologue: Prologue, name: str, x: torch.Tensor) -> tuple:
    """Return the steps of the prologue for x, which is "q" or "k"."""
    if prologue is NOTHING:
        return NO_STEPS
    inverse = inverse_rms(x, prologue.eps) if prologue.norm == TOKEN else None
    weight = prologue.weight(name)
    norm = 0 if prologue.norm is None else 1 + NORMS.index(prologue.norm)
    split = weight is not None and weight.dim() == 2
    return inverse, weight, prologue.cos, prologue.sin, prologue.first, prologue.eps, norm, split


@replayed
def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return 1 / sqrt(mean(x²) + eps) over the channels of all heads, [B, L] float32."""
    from .kernels.prologue import inverse_rms_kernel

    b, heads, length, d = x.shape
    inverse = _empty(x, b, length)
    tiles = -(-length // NORM_ROWS)
    sizes = (heads, length, d, *x.stride(), tiles)
    constants = (NORM_ROWS, width(d))
    launch(
        inverse_rms_kernel,
        b * tiles,
        (x, inverse, eps, *sizes, *constants),
        options(4),
        (x.dtype, alignment(x), _key(*sizes), constants),
        x.device,
    )
    return inverse


def _empty(x: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return empty(shape, dtype, x.device)


@replayed
def _center(k: torch.Tensor, steps: tuple) -> torch.Tensor:
    """Return what is taken off the keys, about the mean of a sample of them, [B · Hkv, W]."""
    from .kernels.prepare import STEP, center_kernel, survey_kernel

    b, heads, keys, d = k.shape
    total, part, bh, w = min(keys, prepass.SAMPLE), prepass.SURVEY_TOKENS, b * heads, width(d)
    parts = -(-total // part)
    means, center = _empty(k, bh, parts, w), _empty(k, bh, w)
    sizes = (heads, total, keys, d, *k.stride(), parts)
    constants = (part, w)
    launch(
        survey_kernel,
        bh * -(-total // STEP.value),
        (k, means, *sizes, *steps, *constants),
        options(4),
        (k.dtype, alignment(k), _key(*sizes), *_code_of(steps), constants),
        k.device,
    )
    constants = (TOGETHER, w)
    launch(
        center_kernel,
        bh,
        (means, center, parts, *constants),
        options(4),
        (_key(parts), constants),
        k.device,
    )
    return center


@replayed
def _statistics(v: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean token of v and each channel's scale, [B · Hkv, W]."""
    from .kernels.prepare import gather_kernel, statistics_kernel

    b, heads, keys, d = v.shape
    bh, w, chunks = b * heads, width(d), -(-keys // CHUNK_KEYS)
    partial, mean, scale = _empty(v, bh, chunks, 3, w), _empty(v, bh, w), _empty(v, bh, w)
    sizes = (heads, keys, d, *v.stride(), chunks)
    constants = (CHUNK_KEYS, CHUNK_STAGES, w)
    launch(
        statistics_kernel,
        bh * chunks,
        (v, partial, *sizes, *constants),
        options(MORE_WARPS if w > MANY_CHANNELS else CHUNK_WARPS),
        (v.dtype, alignment(v), _key(*sizes), constants),
        v.device,
    )
    constants = (limit, TOGETHER, w)
    launch(
        gather_kernel,
        bh,
        (partial, mean, scale, keys, chunks, *constants),
        options(4),
        (_key(keys, chunks), constants),
        v.device,
    )
    return mean, scale


@replayed
def _queries(q, k_mean, steps, scale: float, heads: int, swizzled, shift, rotate) -> tuple:
    """Return q, q_scale, q_bound and shift of `Prepared`."""
    from .kernels.prepare import quantize_q_kernel

    b, h, length, d = q.shape
    w, tiles = width(d), count(length)
    stored = _empty(q, b * h, tiles, TILE, w, dtype=torch.int8)
    scales, bound = _empty(q, b * h, tiles * TILE), _empty(q, b * h, tiles * TILE)
    shifts = _empty(q, b * h, length) if shift else None
    sizes = (h, h // heads, length, d, *q.stride(), tiles)
    arguments = (scale * LOG2E, *sizes, *steps)
    rows = q_rows(w, rotate)
    constants = (rotate, rows, w, swizzled, shift)
    launch(
        quantize_q_kernel,
        b * h * tiles * (TILE // rows),
        (q, k_mean, stored, scales, bound, shifts, *arguments, *constants),
        options(1),
        (q.dtype, alignment(q), _key(*sizes), *_code_of(steps), constants),
        q.device,
    )
    return stored, scales, bound, shifts


@replayed
def _keys(
    k, k_mean, steps: tuple, groups: int, swizzled: bool, rotate: bool
) -> tuple[torch.Tensor, ...]:
    """Return k, k_scale and k_bound of `Prepared`."""
    from .kernels.prepare import quantize_k_kernel

    b, heads, keys, d = k.shape
    bh, w, blocks = b * heads, width(d), count(keys)
    stored = _empty(k, bh, blocks, TILE, w, dtype=torch.int8)
    scale, bound = _empty(k, bh, blocks, groups), _empty(k, bh, blocks)
    sizes = (heads, keys, d, *k.stride(), blocks)
    spread = steps is NO_STEPS and not rotate
    constants = (rotate, groups, w, swizzled, spread)
    launch(
        quantize_k_kernel,
        bh * blocks,
        (k, k_mean, stored, scale, bound, *sizes, *steps, *constants),
        options(k_warps(w, k.stride(3), spread)),
        (k.dtype, alignment(k), _key(*sizes), *_code_of(steps), constants),
        k.device,
    )
    return stored, scale, bound


@replayed
def _values(
    v, mean, scale, storage: torch.dtype, swizzled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return v, v_scale, v_offset and v_sum of `Prepared`.

    The offset is not the mean, but what gives back the mean of V exactly: roundings have a mean of
    their own, which all rows would share, and which does not shrink with the number of keys as an
    attention's output does.
    """
    from .kernels.values import offset_kernel, quantize_v_kernel

    b, heads, keys, d = v.shape
    bh, w, blocks = b * heads, width(d), count(keys)
    stored = _empty(v, bh, blocks, w, TILE, dtype=storage)
    sums, offset = _empty(v, bh, blocks, w), _empty(v, bh, w)
    sizes = (heads, keys, d, *v.stride(), blocks)
    channels = min(V_CHANNELS, w)
    constants = (storage == torch.int8, channels, w, swizzled)
    launch(
        quantize_v_kernel,
        bh * blocks * (w // channels),
        (v, mean, scale, stored, sums, *sizes, *constants),
        options(V_WARPS),
        (v.dtype, alignment(v), _key(*sizes), constants),
        v.device,
    )
    constants = (OFFSET_ROWS, OFFSET_COLUMNS, w)
    launch(
        offset_kernel,
        bh * (w // OFFSET_COLUMNS),
        (sums, mean, scale, offset, -1.0 / keys, blocks, *constants),
        options(4),
        (_key(blocks), constants),
        v.device,
    )
    return stored, scale, offset, None if swizzled else sums
