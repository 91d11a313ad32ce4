"""What the kernels of `prepare.py` do to rows of Q and K before they round them."""

import triton
import triton.language as tl

# Of RMS norms: over a head's channels, or over those of all heads.
NO_NORM: tl.constexpr = tl.constexpr(0)
HEAD: tl.constexpr = tl.constexpr(1)
TOKEN: tl.constexpr = tl.constexpr(2)
# Steps of a rotation of the widest head, 256 channels.
MAX_STEPS: tl.constexpr = tl.constexpr(8)


@triton.jit
def inverse_rms_kernel(
    x,
    inverse,
    eps,
    H,
    LENGTH,
    D,
    x_b,
    x_h,
    x_l,
    x_d,
    TILES,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """inverse[b, l] = 1 / sqrt(mean(x²) + eps) over all H · D channels of a token; [B, LENGTH]."""
    b = (tl.program_id(0) // TILES).to(tl.int64)
    rows = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    valid = (rows < LENGTH)[:, None] & (column < D)[None, :]
    at = x + b * x_b + rows.to(tl.int64)[:, None] * x_l + column.to(tl.int64)[None, :] * x_d
    square = tl.zeros((ROWS, WIDTH), tl.float32)
    for _ in range(0, H):
        value = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        square += value * value
        at += x_h
    mean = tl.sum(square, axis=1) / (H * D)
    tl.store(inverse + b * LENGTH + rows, 1.0 / tl.sqrt(mean + eps), mask=rows < LENGTH)


@triton.jit
def _weighted(
    x,
    rows,
    h,
    H,
    D,
    weight,
    first,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return rows x [R, WIDTH] of head h times the norm's weight."""
    d = tl.arange(0, WIDTH)
    heads = H if NORM == TOKEN else 1
    weight += h % heads * D
    if SPLIT:
        at = (rows >= first).to(tl.int32)[:, None] * (heads * D) + d[None, :]
        w = tl.load(weight + at, mask=(d < D)[None, :], other=0.0)
    else:
        w = tl.load(weight + d, mask=d < D, other=0.0)[None, :]
    return x * w.to(tl.float32)


@triton.jit
def _turned(x, rows, valid, D, cos, sin, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return x [ROWS, WIDTH] with each pair of neighbours turned by its token's angle."""
    pair = tl.arange(0, WIDTH // 2)
    at = rows.to(tl.int64)[:, None] * (D // 2) + pair[None, :]
    inside = valid[:, None] & (pair < D // 2)[None, :]
    c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, WIDTH))


@triton.jit
def apply(
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
    """Return float32 rows x [ROWS, WIDTH] of head h after the steps of `prologue.Prologue`.

    inverse: what `inverse_rms_kernel` wrote, for the norm of a token. Rows that are not valid, and
    columns beyond D, are zeros.
    """
    if NORM == HEAD:
        x *= (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps))[:, None]
    elif NORM == TOKEN:
        x *= tl.load(inverse + b * LENGTH + rows, mask=valid, other=0.0)[:, None]
    if weight is not None:
        x = _weighted(x, rows, h, H, D, weight, first, NORM, SPLIT, WIDTH)
    if cos is not None:
        x = _turned(x, rows, valid, D, cos, sin, ROWS, WIDTH)
    return tl.where(valid[:, None], x, 0.0)


@triton.jit
def rotate(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return x [ROWS, WIDTH] times the orthonormal Hadamard matrix, in float32.

    By the matrix's recursion: each step takes the sums and the differences of the two halves, and
    stores them in turn, so that after all steps each channel is back in its place. A thread that
    holds whole rows exchanges nothing with others. Were neighbours summed first, the compiler would
    do the rotary embedding twice, once for each of them.
    """
    HALF: tl.constexpr = WIDTH // 2
    for step in tl.static_range(MAX_STEPS):
        if 1 << step < WIDTH:
            low, high = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
            x = tl.reshape(tl.join(low + high, low - high), (ROWS, WIDTH))
    return x * (1.0 / WIDTH**0.5)
