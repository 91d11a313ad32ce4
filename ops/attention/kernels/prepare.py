"""The Triton kernels that bring Q and K to 8 bits; `values.py` has V's.

The copies come in tiles of 128 tokens, padded with zeros. The kernel for Hopper wants them
SWIZZLED: 16-byte chunk c of a row stands at c ^ (row % 8).
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
# By this indices are spread over 32 bits: 2654435761, of 2^32 the golden section, less 2^32.
SPREAD_BITS: tl.constexpr = tl.constexpr(-1640531535)
# The smallest normal float32: the scale of zeros.
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
INT8_MAX: tl.constexpr = tl.constexpr(127.0)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _bits(x):
    """Return the bits of |x|, ordered as the magnitudes are; NaN has the largest of all."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _of_rows(x, SPREAD: tl.constexpr):
    """Return a number each of rows as a tile has them: [rows, 1, 1]; SPREAD: [1, rows, 1]."""
    return x[None, :, None] if SPREAD else x[:, None, None]


@triton.jit
def _of_channels(x, SPREAD: tl.constexpr):
    """Return numbers of channels [WIDTH / 16, 16] as a tile has them."""
    return x[:, None, :] if SPREAD else x[None, :, :]


@triton.jit
def _load(x, rows, valid, stride_l, stride_d, D, WIDTH: tl.constexpr, SPREAD: tl.constexpr):
    """Return rows of x in float32, [rows, WIDTH / 16, 16], zeros beyond D.

    SPREAD: [WIDTH / 16, rows, 16]. Of dimensions that are alike to the compiler it gives
    neighbouring threads the first: they have chunks of one row and read and write it together,
    where otherwise each has a row, which is for what exchanges numbers within one.
    """
    d = tl.arange(0, WIDTH // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    at = _of_rows(rows.to(tl.int64) * stride_l, SPREAD) + _of_channels(
        d.to(tl.int64) * stride_d, SPREAD
    )
    inside = _of_rows(valid, SPREAD) & _of_channels(d < D, SPREAD)
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


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
def _place(rows: tl.constexpr, CHUNKS: tl.constexpr, SWIZZLED: tl.constexpr, SPREAD: tl.constexpr):
    """Return where the elements of a tile, as `_load` gives it, stand in its copy, in bytes."""
    row = _of_rows(tl.arange(0, rows), SPREAD)
    chunk = _of_channels(tl.arange(0, CHUNKS)[:, None], SPREAD)
    if SWIZZLED:
        tl.static_assert(CHUNKS >= 8, "rows of 128 bytes and more are swizzled")
        chunk = chunk ^ (row % 8)
    return row * (CHUNKS * CHUNK) + chunk * CHUNK + tl.arange(0, CHUNK)[None, None, :]


@triton.jit
def _whole(x):
    """Return float32 x rounded to INT8, and the same as float32: a cast back would be slow."""
    x += ROUND
    return x.to(tl.int32, bitcast=True).to(tl.int8), x - ROUND


@triton.jit
def _spread(x, GROUPS: tl.constexpr):
    """Return x [GROUPS] for each of 128 keys: key k is of group (k % 8) / 2, or all are of one."""
    x = tl.broadcast_to(x[None, :, None], (TILE // (2 * GROUPS), GROUPS, 2))
    return tl.reshape(x, (TILE,))


@triton.jit
def _added(total, high, low, value, valid, MASKED: tl.constexpr):
    """Return total, high and low with a value each. MASKED: only where `valid`, else it is 0."""
    value = value.to(tl.float32)
    total += value
    above, below = value, value
    if MASKED:
        above = tl.where(valid, value, float("-inf"))
        below = tl.where(valid, value, float("inf"))
    return total, tl.maximum(high, above), tl.minimum(low, below)


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
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """partial[bh, chunk] = the sum over ROWS keys of x, the largest and the least.

    STAGES: so many times STEP keys are at hand or on their way.

    partial: [B·H, CHUNKS, 3, WIDTH] float32.
    """
    chunk = tl.program_id(0) % CHUNKS
    bh = (tl.program_id(0) // CHUNKS).to(tl.int64)
    column = tl.arange(0, WIDTH)
    rows = chunk * ROWS + tl.arange(0, STEP)
    x += bh // H * x_b + bh % H * x_h
    total = tl.zeros((STEP, WIDTH), tl.float32)
    high = tl.full((STEP, WIDTH), float("-inf"), tl.float32)
    low = tl.full((STEP, WIDTH), float("inf"), tl.float32)
    end = tl.minimum(KEYS - chunk * ROWS, ROWS)
    inside = (column < D)[None, :]
    x += column.to(tl.int64)[None, :] * x_d
    # Whole steps, which need no selections, on their way to shared memory while others are added
    # up: a loop that is unrolled still reads one vector after the other.
    done = end // STEP * STEP
    for start in tl.range(0, done, STEP, num_stages=STAGES):
        key = (rows + start).to(tl.int64)
        value = tl.load(x + key[:, None] * x_l, mask=inside, other=0.0)
        total, high, low = _added(total, high, low, value, inside, False)
    if done < end:
        valid = (rows + done < KEYS)[:, None] & inside
        key = (rows + done).to(tl.int64)
        value = tl.load(x + key[:, None] * x_l, mask=valid, other=0.0)
        total, high, low = _added(total, high, low, value, valid, True)
    at = partial + (bh * CHUNKS + chunk) * 3 * WIDTH + column
    tl.store(at, tl.sum(total, axis=0))
    tl.store(at + WIDTH, tl.max(high, axis=0))
    tl.store(at + 2 * WIDTH, tl.min(low, axis=0))


@triton.jit
def gather_kernel(
    partial,
    mean,
    scale,
    COUNT,
    CHUNKS,
    LIMIT: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """mean, scale [B·H, WIDTH] = what `partial` adds up to, one program for each bh.

    scale: the largest distance from the mean over LIMIT. A NaN stays: sums carry it.
    """
    bh = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    high = tl.full((WIDTH,), float("-inf"), tl.float32)
    low = tl.full((WIDTH,), float("inf"), tl.float32)
    at = partial + bh * CHUNKS * 3 * WIDTH + column
    for start in range(0, CHUNKS, TOGETHER):
        # Added one after the other, but read at once.
        for i in tl.static_range(TOGETHER):
            inside = start + i < CHUNKS
            total += tl.load(at, mask=inside, other=0.0)
            high = tl.maximum(high, tl.load(at + WIDTH, mask=inside, other=float("-inf")))
            low = tl.minimum(low, tl.load(at + 2 * WIDTH, mask=inside, other=float("inf")))
            at += 3 * WIDTH
    middle = total / COUNT
    tl.store(mean + bh * WIDTH + column, middle)
    step = tl.maximum(high - middle, middle - low) / LIMIT
    # A difference with NaN or Inf in it is neither above nor below.
    step = tl.where(middle - middle == 0, step, middle - middle)
    tl.store(scale + bh * WIDTH + column, tl.where(step < TINY, TINY, step))


@triton.jit
def _sampled(i, COUNT, KEYS):
    """Return the i-th of COUNT keys that stand for all: as tokens.cu has it."""
    begin = (i.to(tl.int64) * KEYS // COUNT).to(tl.int32)
    end = ((i + 1).to(tl.int64) * KEYS // COUNT).to(tl.int32)
    offset = ((i * SPREAD_BITS).to(tl.uint32) >> 16).to(tl.int64) * (end - begin) >> 16
    return begin + offset.to(tl.int32)


@triton.jit
def survey_kernel(
    x,
    means,
    H,
    COUNT,
    KEYS,
    D,
    x_b,
    x_h,
    x_l,
    x_d,
    PARTS,
    inverse,
    weight,
    cos,
    sin,
    first,
    eps,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """means[bh, part] = the mean of PART of COUNT sampled keys of x, after the prologue's steps.

    means: [B·H, PARTS, WIDTH] float32. A program has STEP keys.
    """
    steps = tl.cdiv(COUNT, STEP)
    step = tl.program_id(0) % steps
    bh = (tl.program_id(0) // steps).to(tl.int64)
    column = tl.arange(0, WIDTH)
    rows = step * STEP + tl.arange(0, STEP)
    counts = rows < COUNT
    key = tl.where(counts, _sampled(rows, COUNT, KEYS), 0)
    x += bh // H * x_b + bh % H * x_h
    at = key.to(tl.int64)[:, None] * x_l + column.to(tl.int64)[None, :] * x_d
    valid = counts[:, None] & (column < D)[None, :]
    value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    value = apply(
        *(value, key, counts, bh // H, bh % H, H, KEYS, D),
        *(inverse, weight, cos, sin, first, eps, NORM, SPLIT, STEP, WIDTH),
    )
    total = tl.sum(tl.reshape(value, (STEP // PART, PART, WIDTH)), axis=1)
    part = step * (STEP // PART) + tl.arange(0, STEP // PART)
    share = tl.maximum(tl.minimum(COUNT - part * PART, PART), 1).to(tl.float32)
    to = means + (bh * PARTS + part[:, None]) * WIDTH + column[None, :]
    tl.store(to, total / share[:, None], mask=(part < PARTS)[:, None])


@triton.jit
def center_kernel(means, center, PARTS, TOGETHER: tl.constexpr, WIDTH: tl.constexpr):
    """center [B·H, WIDTH] = where most of `means` [B·H, PARTS, WIDTH] are, as tokens.cu has it.

    Of each three, a third of the parts from each other, the one in the middle; the mean of these.
    """
    bh = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    triples = tl.where(PARTS < 3, PARTS, PARTS // 3)
    apart = tl.where(PARTS < 3, 0, triples)
    total = tl.zeros((TOGETHER, WIDTH), tl.float32)
    means += bh * PARTS * WIDTH + column[None, :]
    for start in range(0, triples, TOGETHER):
        part = start + tl.arange(0, TOGETHER)
        inside = (part < triples)[:, None]
        a = tl.load(means + part[:, None] * WIDTH, mask=inside, other=0.0)
        b = tl.load(means + (part + apart)[:, None] * WIDTH, mask=inside, other=0.0)
        c = tl.load(means + (part + 2 * apart)[:, None] * WIDTH, mask=inside, other=0.0)
        total += tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
    tl.store(center + bh * WIDTH + column, tl.sum(total, axis=0) / triples)


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
    x = _load(q, rows, valid, q_l, q_d, D, WIDTH, False)
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
    codes, _ = _whole(x * tl.div_rn(1.0, step)[:, None, None])
    start = (bh * TILES * PER_TILE + tile) * ROWS
    tl.store(stored + start * WIDTH + _place(ROWS, WIDTH // CHUNK, SWIZZLED, False), codes)
    scaled = step * factor
    tl.store(scale + start + local, scaled)
    # Here the cast back is the faster one.
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
    SPREAD: tl.constexpr,
):
    """stored, scale = 128 keys less the mean key, in GROUPS groups over their largest magnitude.

    Before, the prologue's steps; after all ROTATE: times the Hadamard matrix. SPREAD: as
    `_load` has it, where there is neither.

    scale: [B·H, BLOCKS, GROUPS]. bound: [B·H, BLOCKS], the largest norm of a stored key, scaled.
    """
    block = tl.program_id(0) % BLOCKS
    bh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    k += bh // H * k_b + bh % H * k_h
    local = tl.arange(0, TILE)
    rows = block * TILE + local
    valid = rows < KEYS
    x = _load(k, rows, valid, k_l, k_d, D, WIDTH, SPREAD)
    if not SPREAD:
        x = _prepared(
            *(x, rows, valid, bh // H, bh % H, H, KEYS, D),
            *(inverse, weight, cos, sin, first, eps, NORM, SPLIT, TILE, WIDTH),
        )
    d = tl.arange(0, WIDTH // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    mean = tl.load(k_mean + bh * WIDTH + d)
    x = tl.where(_of_rows(valid, SPREAD), x - _of_channels(mean, SPREAD), 0.0)
    if not SPREAD:
        x = _rotated(x, ROTATE, TILE, WIDTH)
    ACROSS: tl.constexpr = 0 if SPREAD else 1
    largest = tl.max(tl.max(_bits(x), axis=2), axis=ACROSS)
    grouped = tl.reshape(largest, (TILE // (2 * GROUPS), GROUPS, 2))
    largest = tl.max(tl.max(grouped, axis=2), axis=0).to(tl.float32, bitcast=True)
    step = tl.div_rn(largest, INT8_MAX)
    step = tl.where(step < TINY, TINY, step)
    each = _spread(step, GROUPS)
    codes, exact = _whole(x * _of_rows(tl.div_rn(1.0, each), SPREAD))
    tile = bh * BLOCKS + block
    place = _place(TILE, WIDTH // CHUNK, SWIZZLED, SPREAD)
    tl.store(stored + tile * (TILE * WIDTH) + place, codes)
    tl.store(scale + tile * GROUPS + tl.arange(0, GROUPS), step)
    norm = each * tl.sqrt(tl.sum(tl.sum(exact * exact, axis=2), axis=ACROSS))
    tl.store(bound + tile, tl.max(_bits(norm), axis=0).to(tl.float32, bitcast=True))
