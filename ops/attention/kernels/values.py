"""The Triton kernels that bring V to 8 bits, transposed, in tiles of 128 keys.

SWIZZLED, as the kernel for Hopper reads them: 16-byte chunk c of a row stands at c ^ (row % 8), and
the keys are in the order of `ops/layout`.
"""

import triton
import triton.language as tl

from .prepare import CHUNK, ROUND, TILE

# The bits of a float32's exponent, and 1.5 · 2^20: to x of exponent e add this times 2^e, and what
# is left when it is taken off again is x rounded to 3 bits of mantissa, to nearest even.
EXPONENT: tl.constexpr = tl.constexpr(0x7F800000)
E4M3_ROUND: tl.constexpr = tl.constexpr(1572864.0)
# Below, E4M3's steps are those of this exponent.
E4M3_NORMAL: tl.constexpr = tl.constexpr(0.015625)


@triton.jit
def _e4m3(x):
    """Return float32 x, at most 448, rounded to what E4M3 holds, as float32.

    In arithmetic: a cast to FP8 and back is compiled wrongly by ptxas 12.8 and 12.9 in the kernel
    below (the cast back reads a register that was never written).
    """
    power = (x.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    power = tl.maximum(power, E4M3_NORMAL)
    # The products are powers of two and a half more: exact.
    return tl.fma(power, -E4M3_ROUND, tl.fma(power, E4M3_ROUND, x))


@triton.jit
def _key(first, WORD: tl.constexpr, BYTE: tl.constexpr, SWIZZLED: tl.constexpr):
    """Return the key that stands in a byte of a word of a chunk whose first key is `first`."""
    if SWIZZLED:
        # ops/layout.
        return first + (WORD * 2 + BYTE // 2 * 8 + BYTE % 2)
    return first + (WORD * 4 + BYTE)


@triton.jit
def _read(v, first, KEYS, v_l, inside, WORD: tl.constexpr, SWIZZLED: tl.constexpr):
    """Return the four keys of the WORD-th word of each chunk as they are, [CHUNKS, CHANNELS]."""
    key = _key(first, WORD, 0, SWIZZLED)
    x0 = tl.load(v + key.to(tl.int64) * v_l, mask=(key < KEYS) & inside, other=0.0)
    key = _key(first, WORD, 1, SWIZZLED)
    x1 = tl.load(v + key.to(tl.int64) * v_l, mask=(key < KEYS) & inside, other=0.0)
    key = _key(first, WORD, 2, SWIZZLED)
    x2 = tl.load(v + key.to(tl.int64) * v_l, mask=(key < KEYS) & inside, other=0.0)
    key = _key(first, WORD, 3, SWIZZLED)
    x3 = tl.load(v + key.to(tl.int64) * v_l, mask=(key < KEYS) & inside, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _rounded(x, valid, mean, inverse, INTEGER: tl.constexpr):
    """Return x less the mean, over the scale and rounded, as float32."""
    x = tl.where(valid, (x.to(tl.float32) - mean) * inverse, 0.0)
    if INTEGER:
        return (x + ROUND) - ROUND
    return _e4m3(x)


@triton.jit
def _pair(low, high, INTEGER: tl.constexpr, FP8: tl.constexpr):
    """Return the codes of two rounded tensors as bytes 0 and 1 of words."""
    if INTEGER:
        low = (low + ROUND).to(tl.int32, bitcast=True) & 255
        high = (high + ROUND).to(tl.int32, bitcast=True) & 255
    else:
        # Side by side: one instruction casts both.
        codes = tl.join(low, high).to(FP8).to(tl.uint8, bitcast=True).to(tl.int32)
        low, high = tl.split(codes)
    return low | (high << 8)


@triton.jit
def _word(
    x,
    first,
    KEYS,
    mean,
    inverse,
    WORD: tl.constexpr,
    INTEGER: tl.constexpr,
    FP8: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """Return what `_read` gave as the bytes of words, and the sums of what is stored of it."""
    x0 = _rounded(x[0], _key(first, WORD, 0, SWIZZLED) < KEYS, mean, inverse, INTEGER)
    x1 = _rounded(x[1], _key(first, WORD, 1, SWIZZLED) < KEYS, mean, inverse, INTEGER)
    x2 = _rounded(x[2], _key(first, WORD, 2, SWIZZLED) < KEYS, mean, inverse, INTEGER)
    x3 = _rounded(x[3], _key(first, WORD, 3, SWIZZLED) < KEYS, mean, inverse, INTEGER)
    word = _pair(x0, x1, INTEGER, FP8) | (_pair(x2, x3, INTEGER, FP8) << 16)
    return word, (x0 + x1) + (x2 + x3)


@triton.jit
def quantize_v_kernel(
    v,
    v_mean,
    v_scale,
    stored,
    sums,
    H,
    KEYS,
    D,
    v_b,
    v_h,
    v_l,
    v_d,
    BLOCKS,
    INTEGER: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """stored = 128 keys of V less its mean, over its scale, transposed: [B·H, BLOCKS, WIDTH, 128].

    sums: [B·H, BLOCKS, WIDTH] float32, of the stored numbers of each channel. A program has
    CHANNELS of these, a thread all 16 keys of a 16-byte chunk of some.
    """
    PARTS: tl.constexpr = WIDTH // CHANNELS
    CHUNKS: tl.constexpr = TILE // CHUNK
    FP8: tl.constexpr = stored.dtype.element_ty
    tile = tl.program_id(0) // PARTS
    bh = (tile // BLOCKS).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    channel = tl.program_id(0) % PARTS * CHANNELS + tl.arange(0, CHANNELS)
    v += bh // H * v_b + bh % H * v_h + channel.to(tl.int64)[None, :] * v_d
    inside = (channel < D)[None, :]
    first = (tile % BLOCKS * TILE + chunk * CHUNK)[:, None]
    # All are read before any is used: of reads between sums the compiler puts few side by side.
    x0 = _read(v, first, KEYS, v_l, inside, 0, SWIZZLED)
    x1 = _read(v, first, KEYS, v_l, inside, 1, SWIZZLED)
    x2 = _read(v, first, KEYS, v_l, inside, 2, SWIZZLED)
    x3 = _read(v, first, KEYS, v_l, inside, 3, SWIZZLED)
    # As V is read, by each thread for itself: nothing is exchanged.
    of_channel = tl.broadcast_to((bh * WIDTH + channel)[None, :], (CHUNKS, CHANNELS))
    mean = tl.load(v_mean + of_channel)
    inverse = tl.div_rn(1.0, tl.load(v_scale + of_channel))
    w0, sum0 = _word(x0, first, KEYS, mean, inverse, 0, INTEGER, FP8, SWIZZLED)
    w1, sum1 = _word(x1, first, KEYS, mean, inverse, 1, INTEGER, FP8, SWIZZLED)
    w2, sum2 = _word(x2, first, KEYS, mean, inverse, 2, INTEGER, FP8, SWIZZLED)
    w3, sum3 = _word(x3, first, KEYS, mean, inverse, 3, INTEGER, FP8, SWIZZLED)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (CHUNKS, CHANNELS, CHUNK // 4))
    # Chunks before channels: of dimensions that are alike to the compiler it gives neighbouring
    # threads the first, and so they write whole rows.
    row, place = channel[None, :, None], chunk[:, None, None]
    if SWIZZLED:
        place = place ^ (row % 8)
    at = row * (TILE // 4) + place * (CHUNK // 4) + tl.arange(0, CHUNK // 4)[None, None, :]
    stored += tile.to(tl.int64) * (TILE * WIDTH)
    tl.store(stored.to(tl.pointer_type(tl.int32)) + at, words)
    total = tl.sum((sum0 + sum1) + (sum2 + sum3), axis=0)
    tl.store(sums + tile.to(tl.int64) * WIDTH + channel, total)


@triton.jit
def offset_kernel(
    sums,
    mean,
    scale,
    offset,
    factor,
    BLOCKS,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """offset [B·H, WIDTH] = mean + factor · scale · the sum of `sums` over the blocks."""
    PARTS: tl.constexpr = WIDTH // COLUMNS
    bh = (tl.program_id(0) // PARTS).to(tl.int64)
    column = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, BLOCKS, ROWS):
        block = start + tl.arange(0, ROWS)
        at = (bh * BLOCKS + block)[:, None] * WIDTH + column[None, :]
        total += tl.load(sums + at, mask=(block < BLOCKS)[:, None], other=0.0)
    at = bh * WIDTH + column
    step = tl.load(scale + at) * factor
    tl.store(offset + at, tl.fma(step, tl.sum(total, axis=0), tl.load(mean + at)))
