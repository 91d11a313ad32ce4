"""The Triton kernel behind `quantize_rows`: one program per token, one pass over memory.

A row is seen as G groups of 256 columns, each a 16 x 16 matrix X. The regular 256-wide Hadamard
matrix is the Kronecker product of two 16-wide ones, which are symmetric, so a rotated group is
H X H: two small products on the tensor cores, with a transposition between them and one after.
H holds ±1, exact in every dtype; the 1/16 that makes the rotation orthonormal joins the scale.
"""

import triton
import triton.language as tl

SIDE: tl.constexpr = tl.constexpr(16)
UNIT: tl.constexpr = tl.constexpr(0.0625)
# A small float32 plus 1.5 · 2^23 is the nearest even integer, in the low bits of its mantissa.
ROUND: tl.constexpr = tl.constexpr(12582912.0)
# The smallest normal float32: the scale of a token of zeros.
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _hadamard():
    """Return the regular 16-wide Hadamard matrix of ±1.

    The 4-wide one is -1 where the row and the column add up to 3; this is its Kronecker square.
    """
    i = tl.arange(0, SIDE)[:, None]
    j = tl.arange(0, SIDE)[None, :]
    low = (i % 4 + j % 4) == 3
    high = (i // 4 + j // 4) == 3
    return tl.where(low != high, -1.0, 1.0)


@triton.jit
def _turn(x, GROUPS: tl.constexpr):
    """Return x [GROUPS · 16, 16] with each group of 16 rows transposed."""
    x = tl.permute(tl.reshape(x, (GROUPS, SIDE, SIDE)), (0, 2, 1))
    return tl.reshape(x, (GROUPS * SIDE, SIDE))


@triton.jit
def _at(start, GROUPS: tl.constexpr):
    row = start * SIDE + tl.arange(0, GROUPS * SIDE)
    return row[:, None] * SIDE + tl.arange(0, SIDE)[None, :]


@triton.jit
def _load(x, start, K, GROUPS: tl.constexpr, ROTATE: tl.constexpr):
    """Return GROUPS groups of a row in float32, [GROUPS · 16, 16], from group `start` on.

    Rotated groups come transposed, and 16 times too large. Between the products they are rounded
    to TF32 (11 bits), as is a float32 x: far below the rounding to 8 bits that follows.
    """
    at = _at(start, GROUPS)
    value = tl.load(x + at, mask=at < K, other=0.0)
    if ROTATE:
        h = _hadamard()
        value = tl.dot(value, h.to(value.dtype), input_precision="tf32")
        value = tl.dot(_turn(value, GROUPS), h, input_precision="tf32")
    return value.to(tl.float32)


@triton.jit
def _largest(x):
    """Return the bits of the largest magnitude in x; NaN has the largest bits of all."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit
def _store(
    stored, value, start, K, GROUPS: tl.constexpr, ROTATE: tl.constexpr, INTEGER: tl.constexpr
):
    """Round value [GROUPS · 16, 16] and store it from group `start` on."""
    if INTEGER:
        out = (value + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        out = value.to(stored.dtype.element_ty).to(tl.int8, bitcast=True)
    if ROTATE:
        out = _turn(out, GROUPS)
    at = _at(start, GROUPS)
    tl.store(stored + at, out.to(stored.dtype.element_ty, bitcast=True), mask=at < K)


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
    # Division rounded as IEEE has it: the same codes and scales on every device.
    step = tl.div_rn(largest * unit, LIMIT)
    # Not tl.maximum, which would drop a NaN.
    step = tl.where(step < TINY, TINY, step)
    inverse = tl.div_rn(1.0, step) * unit
    _store(stored, v0 * inverse, 0, K, G0, ROTATE, INTEGER)
    if G1 > 0:
        _store(stored, v1 * inverse, G0, K, G1, ROTATE, INTEGER)
    if G2 > 0:
        _store(stored, v2 * inverse, G0 + G1, K, G2, ROTATE, INTEGER)
    tl.store(scale + row, step)
