"""The Triton kernel behind `quantize_rows`: one program per token, one pass over memory.

The regular 4 x 4 Hadamard matrix is (J - 2I)R: J all ones, R the reversal. The 256-wide one is four
of them side by side (a Kronecker product), so a rotation is four times "sum of four, minus twice
itself" along the four base-4 digits of the column, and one reversal of all 256 columns at the end.
With 8 columns a thread, a warp holds a group: sums over the low digits stay in registers, those over
the high ones are shuffles, and the reversal is the other order of stores.
"""

import triton
import triton.language as tl

GROUP: tl.constexpr = tl.constexpr(256)
# 1 / sqrt(256), which makes the rotation orthonormal.
UNIT: tl.constexpr = tl.constexpr(0.0625)
# A small float32 plus 1.5 · 2^23 is the nearest even integer, in the low bits of its mantissa.
ROUND: tl.constexpr = tl.constexpr(12582912.0)
# The smallest normal float32: the scale of a token of zeros.
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _butterflies(x, GROUPS: tl.constexpr):
    """Return x [GROUPS, 256], each row times (J - 2I) along each of its four base-4 digits."""
    x = tl.reshape(x, (GROUPS, 4, 4, 4, 4))
    x = tl.sum(x, axis=4, keep_dims=True) - 2.0 * x
    x = tl.sum(x, axis=3, keep_dims=True) - 2.0 * x
    x = tl.sum(x, axis=2, keep_dims=True) - 2.0 * x
    x = tl.sum(x, axis=1, keep_dims=True) - 2.0 * x
    return tl.reshape(x, (GROUPS, GROUP))


@triton.jit
def _load(x, start, K, GROUPS: tl.constexpr, ROTATE: tl.constexpr):
    """Return GROUPS groups of a row [GROUPS, 256] in float32, from group `start` on."""
    group = start + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    if ROTATE:
        value = _butterflies(value, GROUPS)
    return value


@triton.jit
def _largest(x):
    """Return the bits of the largest magnitude in x; NaN has the largest bits of all."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit
def _store(
    stored,
    value,
    start,
    K,
    GROUPS: tl.constexpr,
    ROTATE: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """Round value [GROUPS, 256] and store it from group `start` on."""
    if INTEGER:
        out = (value + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        out = value.to(stored.dtype.element_ty)
    group = start + tl.arange(0, GROUPS)
    if ROTATE:
        # Column i goes to column 255 - i: the 8 of a thread in turn, the threads by address.
        turned = tl.flip(tl.reshape(out.to(tl.int8, bitcast=True), (GROUPS, 32, 8)), 2)
        lane = (31 - tl.arange(0, 32)) * 8
        at = group[:, None, None] * GROUP + lane[None, :, None] + tl.arange(0, 8)[None, None, :]
        tl.store(stored + at, turned.to(stored.dtype.element_ty, bitcast=True), mask=at < K)
    else:
        at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(stored + at, out, mask=at < K)


@triton.jit
def quantize_rows_kernel(
    x,
    stored,
    scale,
    K,
    stride_x,
    LIMIT: tl.constexpr,
    G0: tl.constexpr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    ROTATE: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """stored, scale = the row of `program_id(0)`, rotated or not, over its largest magnitude.

    x: [M, K], K-contiguous, stride_x apart. stored: [M, K] int8 or E4M3. scale: [M] float32.
    G0 + G1 + G2 groups of 256 cover the row, each a power of two or zero: a block of Triton's is a
    power of two wide, and one alone would compute up to twice the row.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    stored += row * K
    v0 = _load(x, 0, K, G0, ROTATE)
    bits = _largest(v0)
    if G1 > 0:
        v1 = _load(x, G0, K, G1, ROTATE)
        bits = tl.maximum(bits, _largest(v1))
    if G2 > 0:
        v2 = _load(x, G0 + G1, K, G2, ROTATE)
        bits = tl.maximum(bits, _largest(v2))
    largest = bits.to(tl.float32, bitcast=True)
    unit = UNIT if ROTATE else 1.0
    step = largest * (unit / LIMIT)
    # Not tl.maximum, which would drop a NaN.
    step = tl.where(step < TINY, TINY, step)
    inverse = unit / step
    _store(stored, v0 * inverse, 0, K, G0, ROTATE, INTEGER)
    if G1 > 0:
        _store(stored, v1 * inverse, G0, K, G1, ROTATE, INTEGER)
    if G2 > 0:
        _store(stored, v2 * inverse, G0 + G1, K, G2, ROTATE, INTEGER)
    tl.store(scale + row, step)
