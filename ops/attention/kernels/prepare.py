"""The Triton kernels that bring Q, K and V to 8 bits.

The copies come in tiles of 128 tokens, padded with zeros. The kernel for Hopper wants them
SWIZZLED: 16-byte chunk c of a row stands at c ^ (row % 8), and V's keys in the order of
`ops/layout`.
"""

import triton
import triton.language as tl

from .prologue import NO_NORM, apply, rotate

TILE: tl.constexpr = tl.constexpr(128)
CHUNK: tl.constexpr = tl.constexpr(16)
# Keys that the statistics add up side by side.
STEP: tl.constexpr = tl.constexpr(32)
# A small float32 plus 1.5 · 2^23 is the nearest even integer, in the low bits of its mantissa.
ROUND: tl.constexpr = tl.constexpr(12582912.0)
# The same for steps of 2^-9, E4M3's below its smallest normal number.
E4M3_ROUND: tl.constexpr = tl.constexpr(24576.0)
E4M3_NORMAL: tl.constexpr = tl.constexpr(0.015625)
# The smallest normal float32: the scale of zeros.
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
INT8_MAX: tl.constexpr = tl.constexpr(127.0)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _bits(x):
    """Return the bits of |x|, ordered as the magnitudes are; NaN has the largest of all."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _load(x, rows, valid, stride_l, stride_d, D, WIDTH: tl.constexpr):
    """Return rows of x in float32, [rows, WIDTH / 16, 16], zeros beyond D."""
    d = tl.arange(0, WIDTH // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = rows.to(tl.int64)[:, None, None] * stride_l + d[None, :, :] * stride_d
    return tl.load(x + at, mask=valid[:, None, None] & (d < D)[None, :, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _prepared(
    x,
    rows,
    valid,
    b,
    h,
    H,
    LENGTH,
    D,
    inverse,
    weight,
    cos,
    sin,
    first,
    eps,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return x as `_load` gives it, [ROWS, WIDTH / 16, 16], after the prologue's steps."""
    if NORM != NO_NORM or weight is not None or cos is not None:
        x = apply(
            *(tl.reshape(x, (ROWS, WIDTH)), rows, valid, b, h, H, LENGTH, D),
            *(inverse, weight, cos, sin, first, eps, NORM, SPLIT, ROWS, WIDTH),
        )
        x = tl.reshape(x, (ROWS, WIDTH // CHUNK, CHUNK))
    return x


@triton.jit
def _rotated(x, ROTATE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return x [ROWS, WIDTH / 16, 16], its rows times the Hadamard matrix."""
    if ROTATE:
        x = rotate(tl.reshape(x, (ROWS, WIDTH)), ROWS, WIDTH)
        x = tl.reshape(x, (ROWS, WIDTH // CHUNK, CHUNK))
    return x


@triton.jit
def _place(rows: tl.constexpr, CHUNKS: tl.constexpr, SWIZZLED: tl.constexpr):
    """Return where the elements of a [rows, CHUNKS, 16] tile stand in its copy, in bytes."""
    row = tl.arange(0, rows)[:, None, None]
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    if SWIZZLED:
        chunk = chunk ^ (row % 8)
    return row * (CHUNKS * CHUNK) + chunk * CHUNK + tl.arange(0, CHUNK)[None, None, :]


@triton.jit
def _whole(x):
    """Return float32 x rounded to INT8."""
    return (x + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _e4m3(x):
    """Return float32 x, at most 448, rounded to what E4M3 holds, as float32.

    In arithmetic: a cast to FP8 and back is compiled wrongly by ptxas 12.8 and 12.9 in the kernel
    below (the cast back reads a register that was never written).
    """
    bits = x.to(tl.int32, bitcast=True)
    # To nearest even, of 3 bits of mantissa; below 2^-6 in steps of 2^-9.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (x + E4M3_ROUND) - E4M3_ROUND
    return tl.where(tl.abs(x) < E4M3_NORMAL, small, normal)


@triton.jit
def _spread(x, GROUPS: tl.constexpr):
    """Return x [GROUPS] for each of 128 keys: key k is of group (k % 8) / 2, or all are of one."""
    x = tl.broadcast_to(x[None, :, None], (TILE // (2 * GROUPS), GROUPS, 2))
    return tl.reshape(x, (TILE,))


@triton.jit
def statistics_kernel(
    x,
    partial,
    H,
    KEYS,
    D,
    x_b,
    x_h,
    x_l,
    x_d,
    CHUNKS,
    inverse,
    weight,
    cos,
    sin,
    first,
    eps,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANGE: tl.constexpr,
):
    """partial[bh, chunk] = the sum over ROWS keys of x; RANGE: also the largest and the least.

    The keys are those after the prologue's steps.

    partial: [B·H, CHUNKS, 3, WIDTH] float32.
    """
    chunk = tl.program_id(0) % CHUNKS
    bh = (tl.program_id(0) // CHUNKS).to(tl.int64)
    column = tl.arange(0, WIDTH)
    rows = tl.arange(0, STEP)
    x += bh // H * x_b + bh % H * x_h
    total = tl.zeros((STEP, WIDTH), tl.float32)
    high = tl.full((STEP, WIDTH), float("-inf"), tl.float32)
    low = tl.full((STEP, WIDTH), float("inf"), tl.float32)
    for start in range(0, ROWS, STEP):
        key = chunk * ROWS + start + rows
        valid = (key < KEYS)[:, None] & (column < D)[None, :]
        at = x + key.to(tl.int64)[:, None] * x_l + column[None, :] * x_d
        value = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        if NORM != NO_NORM or weight is not None or cos is not None:
            value = apply(
                *(value, key, key < KEYS, bh // H, bh % H, H, KEYS, D),
                *(inverse, weight, cos, sin, first, eps, NORM, SPLIT, STEP, WIDTH),
            )
        total += value
        if RANGE:
            high = tl.maximum(high, tl.where(valid, value, float("-inf")))
            low = tl.minimum(low, tl.where(valid, value, float("inf")))
    at = partial + (bh * CHUNKS + chunk) * 3 * WIDTH + column
    tl.store(at, tl.sum(total, axis=0))
    if RANGE:
        tl.store(at + WIDTH, tl.max(high, axis=0))
        tl.store(at + 2 * WIDTH, tl.min(low, axis=0))


@triton.jit
def gather_kernel(
    partial,
    mean,
    scale,
    KEYS,
    CHUNKS,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    RANGE: tl.constexpr,
):
    """mean, scale [B·H, WIDTH] = what `partial` adds up to, one program for each bh.

    scale: with RANGE, the largest distance from the mean over LIMIT. A NaN stays: sums carry it.
    """
    bh = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    high = tl.full((WIDTH,), float("-inf"), tl.float32)
    low = tl.full((WIDTH,), float("inf"), tl.float32)
    at = partial + bh * CHUNKS * 3 * WIDTH + column
    for _ in range(0, CHUNKS):
        total += tl.load(at)
        if RANGE:
            high = tl.maximum(high, tl.load(at + WIDTH))
            low = tl.minimum(low, tl.load(at + 2 * WIDTH))
        at += 3 * WIDTH
    middle = total / KEYS
    tl.store(mean + bh * WIDTH + column, middle)
    if RANGE:
        step = tl.maximum(high - middle, middle - low) / LIMIT
        # A difference with NaN or Inf in it is neither above nor below.
        step = tl.where(middle - middle == 0, step, middle - middle)
        tl.store(scale + bh * WIDTH + column, tl.where(step < TINY, TINY, step))


@triton.jit
def quantize_q_kernel(
    q,
    k_mean,
    stored,
    scale,
    bound,
    shift,
    factor,
    H,
    GROUP,
    LENGTH,
    D,
    q_b,
    q_h,
    q_l,
    q_d,
    TILES,
    inverse,
    weight,
    cos,
    sin,
    first,
    eps,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    ROTATE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SWIZZLED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """stored, scale = ROWS rows of Q, each over its largest magnitude, times `factor`.

    Before, the prologue's steps; after them ROTATE: times the Hadamard matrix.

    bound: the norms of the stored rows, scaled. SHIFT: shift = the rows times the mean key, which
    K has lost, in float32 and times `factor`.
    """
    PER_TILE: tl.constexpr = TILE // ROWS
    tile = tl.program_id(0) % (TILES * PER_TILE)
    bh = (tl.program_id(0) // (TILES * PER_TILE)).to(tl.int64)
    q += bh // H * q_b + bh % H * q_h
    local = tl.arange(0, ROWS)
    rows = tile * ROWS + local
    valid = rows < LENGTH
    x = _load(q, rows, valid, q_l, q_d, D, WIDTH)
    x = _prepared(
        *(x, rows, valid, bh // H, bh % H, H, LENGTH, D),
        *(inverse, weight, cos, sin, first, eps, NORM, SPLIT, ROWS, WIDTH),
    )
    if SHIFT:
        d = tl.arange(0, WIDTH // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        mean = tl.load(k_mean + bh // GROUP * WIDTH + d)
        product = tl.sum(tl.sum(x * mean[None, :, :], axis=2), axis=1)
        tl.store(shift + bh * LENGTH + rows, product * (factor * LN2), mask=valid)
    x = _rotated(x, ROTATE, ROWS, WIDTH)
    largest = tl.max(tl.max(_bits(x), axis=2), axis=1).to(tl.float32, bitcast=True)
    step = tl.div_rn(largest, INT8_MAX)
    step = tl.where(step < TINY, TINY, step)
    codes = _whole(x * tl.div_rn(1.0, step)[:, None, None])
    start = (bh * TILES * PER_TILE + tile) * ROWS
    tl.store(stored + start * WIDTH + _place(ROWS, WIDTH // CHUNK, SWIZZLED), codes)
    scaled = step * factor
    tl.store(scale + start + local, scaled)
    exact = codes.to(tl.float32)
    square = tl.sum(tl.sum(exact * exact, axis=2), axis=1)
    tl.store(bound + start + local, scaled * tl.sqrt(square))


@triton.jit
def quantize_k_kernel(
    k,
    k_mean,
    stored,
    scale,
    bound,
    H,
    KEYS,
    D,
    k_b,
    k_h,
    k_l,
    k_d,
    BLOCKS,
    inverse,
    weight,
    cos,
    sin,
    first,
    eps,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    ROTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """stored, scale = 128 keys less the mean key, in GROUPS groups over their largest magnitude.

    Before, the prologue's steps; after all ROTATE: times the Hadamard matrix.

    scale: [B·H, BLOCKS, GROUPS]. bound: [B·H, BLOCKS], the largest norm of a stored key, scaled.
    """
    block = tl.program_id(0) % BLOCKS
    bh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    k += bh // H * k_b + bh % H * k_h
    local = tl.arange(0, TILE)
    rows = block * TILE + local
    valid = rows < KEYS
    x = _load(k, rows, valid, k_l, k_d, D, WIDTH)
    x = _prepared(
        *(x, rows, valid, bh // H, bh % H, H, KEYS, D),
        *(inverse, weight, cos, sin, first, eps, NORM, SPLIT, TILE, WIDTH),
    )
    d = tl.arange(0, WIDTH // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    mean = tl.load(k_mean + bh * WIDTH + d)
    x = tl.where(valid[:, None, None], x - mean[None, :, :], 0.0)
    x = _rotated(x, ROTATE, TILE, WIDTH)
    largest = tl.max(tl.max(_bits(x), axis=2), axis=1)
    grouped = tl.reshape(largest, (TILE // (2 * GROUPS), GROUPS, 2))
    largest = tl.max(tl.max(grouped, axis=2), axis=0).to(tl.float32, bitcast=True)
    step = tl.div_rn(largest, INT8_MAX)
    step = tl.where(step < TINY, TINY, step)
    each = _spread(step, GROUPS)
    codes = _whole(x * tl.div_rn(1.0, each)[:, None, None])
    tile = bh * BLOCKS + block
    tl.store(stored + tile * (TILE * WIDTH) + _place(TILE, WIDTH // CHUNK, SWIZZLED), codes)
    tl.store(scale + tile * GROUPS + tl.arange(0, GROUPS), step)
    exact = codes.to(tl.float32)
    norm = each * tl.sqrt(tl.sum(tl.sum(exact * exact, axis=2), axis=1))
    tl.store(bound + tile, tl.max(_bits(norm), axis=0).to(tl.float32, bitcast=True))


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
    WIDTH: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """stored = 128 keys of V less its mean, over its scale, transposed: [B·H, BLOCKS, WIDTH, 128].

    sums: [B·H, BLOCKS, WIDTH] float32, of the stored numbers of each channel.
    """
    QUADS: tl.constexpr = TILE // 4
    block = tl.program_id(0) % BLOCKS
    bh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    v += bh // H * v_b + bh % H * v_h
    quad = tl.arange(0, QUADS)
    column = tl.arange(0, WIDTH)
    mean = tl.load(v_mean + bh * WIDTH + column)
    inverse = tl.div_rn(1.0, tl.load(v_scale + bh * WIDTH + column))
    total = tl.zeros((WIDTH,), tl.float32)
    words = tl.zeros((QUADS, WIDTH), tl.int32)
    # Four keys at a time, as the bytes of a word: words are transposed faster than bytes.
    for byte in tl.static_range(4):
        if SWIZZLED:
            # ops/layout: the key that stands at a place.
            key = quad // 4 * 16 + quad % 4 * 2 + byte // 2 * 8 + byte % 2
        else:
            key = quad * 4 + byte
        rows = block * TILE + key
        valid = (rows < KEYS)[:, None] & (column < D)[None, :]
        at = rows.to(tl.int64)[:, None] * v_l + column[None, :] * v_d
        x = tl.load(v + at, mask=valid, other=0.0).to(tl.float32)
        x = tl.where(valid, (x - mean[None, :]) * inverse[None, :], 0.0)
        if INTEGER:
            codes = _whole(x)
            total += tl.sum(codes.to(tl.float32), axis=0)
        else:
            x = _e4m3(x)
            total += tl.sum(x, axis=0)
            codes = x.to(stored.dtype.element_ty).to(tl.int8, bitcast=True)
        words |= (codes.to(tl.int32) & 255) << (8 * byte)
    first = bh * BLOCKS + block
    tl.store(sums + first * WIDTH + column, total)
    words = tl.reshape(tl.trans(words), (WIDTH, QUADS // 4, 4))
    row = tl.arange(0, WIDTH)[:, None, None]
    chunk = tl.arange(0, QUADS // 4)[None, :, None]
    if SWIZZLED:
        chunk = chunk ^ (row % 8)
    place = row * QUADS + chunk * 4 + tl.arange(0, 4)[None, None, :]
    at = (stored + first * (TILE * WIDTH)).to(tl.pointer_type(tl.int32))
    tl.store(at + place, words)
