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
# GELU is x/2 · (1 + tanh(x · (LINEAR + CUBIC · x²))): √(2/π), and 0.044715 of it.
LINEAR: tl.constexpr = tl.constexpr(0.7978845608028654)
CUBIC: tl.constexpr = tl.constexpr(0.035677408136300125)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# The interpreter has no PTX.
PTX: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _at(start, GROUPS: tl.constexpr):
    """Return the columns of GROUPS groups from group `start` on, [GROUPS · 16, 16]."""
    row = start * SIDE + tl.arange(0, GROUPS * SIDE)
    return row[:, None] * SIDE + tl.arange(0, SIDE)[None, :]


@triton.jit
def _load(x, start, K, GROUPS: tl.constexpr, EXACT: tl.constexpr):
    at = _at(start, GROUPS)
    return tl.load(x + at) if EXACT else tl.load(x + at, mask=at < K, other=0.0)


@triton.jit
def _sum(value):
    return tl.sum(tl.ravel(value), axis=0)


@triton.jit
def _norm(parts, K, eps, STARTS, GROUPS, NORM: tl.constexpr, EXACT: tl.constexpr):
    """Return (mean, 1 / deviation) of a row; the mean is 0 for an RMS norm."""
    mean = 0.0
    if NORM == "layer":
        for i in tl.static_range(len(GROUPS)):
            mean += _sum(parts[i].to(tl.float32))
        mean = mean / K
    squares = 0.0
    for i in tl.static_range(len(GROUPS)):
        away = parts[i].to(tl.float32) - mean
        if not EXACT:
            away = tl.where(_at(STARTS[i], GROUPS[i]) < K, away, 0.0)
        squares += _sum(away * away)
    return mean, 1.0 / tl.sqrt(squares / K + eps)


@triton.jit
def _gelu(x):
    u = x * tl.fma(x * x, CUBIC, LINEAR)
    if PTX:
        # One instruction, to 11 bits: what is 2^-12 of x is far below the rounding to 8 bits.
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [u], tl.float32, True, 1
        )
    else:
        tanh = 2.0 / (1.0 + tl.exp2(-2.0 * LOG2E * u)) - 1.0
    half = 0.5 * x
    return tl.fma(half, tanh, half)


@triton.jit
def _prepare(
    part,
    mean,
    inverse,
    weight,
    bias,
    scale,
    shift,
    start,
    K,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Return part [GROUPS · 16, 16] after norm, weight, bias, modulation and GELU, in float32."""
    value = part.to(tl.float32)
    if NORM != "":
        value = tl.fma(value, inverse, -mean * inverse)
    if weight is not None:
        value *= _load(weight, start, K, GROUPS, EXACT).to(tl.float32)
    if bias is not None:
        value += _load(bias, start, K, GROUPS, EXACT).to(tl.float32)
    if scale is not None:
        value = tl.fma(value, _load(scale, start, K, GROUPS, EXACT).to(tl.float32), value)
    if shift is not None:
        value += _load(shift, start, K, GROUPS, EXACT).to(tl.float32)
    if GELU:
        value = _gelu(value)
    return value if EXACT else tl.where(_at(start, GROUPS) < K, value, 0.0)


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
def _turn(value, GROUPS: tl.constexpr):
    """Return value [GROUPS · 16, 16] with each group of 16 rows transposed."""
    value = tl.permute(tl.reshape(value, (GROUPS, SIDE, SIDE)), (0, 2, 1))
    return tl.reshape(value, (GROUPS * SIDE, SIDE))


@triton.jit
def _rotate(value, GROUPS: tl.constexpr):
    """Return GROUPS groups rotated, transposed and 16 times too large, in float32.

    Between the products they are rounded to TF32 (11 bits), as is a float32 value before: far
    below the rounding to 8 bits that follows.
    """
    h = _hadamard()
    value = tl.dot(value, h.to(value.dtype), input_precision="tf32")
    return tl.dot(_turn(value, GROUPS), h, input_precision="tf32")


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(value):
    """Return the largest magnitude, NaN where there is one."""
    return tl.reduce(tl.ravel(tl.abs(value)), 0, _larger)


@triton.jit
def _round(value, DTYPE, LIMIT: tl.constexpr, ROTATE: tl.constexpr, STATIC: tl.constexpr):
    """Return value rounded to INT8 or FP8; INT8 of a rotated row has ROUND added already."""
    if tl.int8 == DTYPE:
        if not ROTATE:
            value += ROUND
        return value.to(tl.int32, bitcast=True).to(tl.int8)
    if STATIC:
        # Cut off at the limit, Inf would pass for a number.
        value = tl.where(tl.abs(value) == float("inf"), float("nan"), value)
        value = tl.maximum(value, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return value.to(DTYPE)


@triton.jit
def _interleave(code, GROUPS: tl.constexpr):
    """Return codes [GROUPS · 16, 16] in the order of `interleave`."""
    # Of 128 columns: lane, product and half, pair, place in the pair.
    first, second = tl.split(tl.reshape(code, (GROUPS * 2, 4, 8, 2, 2)))
    code = tl.permute(tl.join(second, first), (0, 2, 1, 3, 4))
    return tl.reshape(code, (GROUPS * SIDE, SIDE))


@triton.jit
def _store(
    stored,
    value,
    inverse,
    start,
    K,
    GROUPS: tl.constexpr,
    LIMIT: tl.constexpr,
    ROTATE: tl.constexpr,
    STATIC: tl.constexpr,
    EXACT: tl.constexpr,
    INTERLEAVE: tl.constexpr,
):
    """Store value · inverse, rounded, from group `start` on."""
    DTYPE: tl.constexpr = stored.dtype.element_ty
    if ROTATE and tl.int8 == DTYPE:
        # The sums of a rotation have no last bits to agree on: one rounding fewer.
        value = tl.fma(value, inverse, ROUND)
    else:
        value *= inverse
    # 8 bits are turned as integers: Triton has no transposition of FP8 on every architecture.
    code = _round(value, DTYPE, LIMIT, ROTATE, STATIC).to(tl.int8, bitcast=True)
    if ROTATE:
        code = _turn(code, GROUPS)
    if INTERLEAVE:
        code = _interleave(code, GROUPS)
    code = code.to(DTYPE, bitcast=True)
    at = _at(start, GROUPS)
    if EXACT:
        tl.store(stored + at, code)
    else:
        tl.store(stored + at, code, mask=at < K)


@triton.jit
def _step(largest, row_scale, input_scale, LIMIT: tl.constexpr, STATIC: tl.constexpr):
    """Return the scale of a row: the static one, or its own, which is stored."""
    if STATIC:
        return tl.load(input_scale)
    # Division rounded as IEEE has it: the same codes and scales on every device.
    step = tl.div_rn(largest, LIMIT)
    # Not tl.maximum, which would drop a NaN.
    step = tl.where(step < TINY, TINY, step)
    tl.store(row_scale, step)
    return step


@triton.jit
def quantize_rows_kernel(
    x,
    stored,
    row_scale,
    input_scale,
    weight,
    bias,
    scale,
    shift,
    K,
    stride_x,
    stride_scale,
    stride_shift,
    tokens_scale,
    tokens_shift,
    eps,
    LIMIT: tl.constexpr,
    STARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    EXACT: tl.constexpr,
    ROTATE: tl.constexpr,
    PREPARE: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    INTERLEAVE: tl.constexpr = False,
):
    """stored, row_scale = the prepared row of `program_id(0)` over its largest magnitude.

    x: [M, K], K-contiguous, stride_x apart. stored: [M, K] int8 or E4M3. row_scale: [M] float32.
    input_scale: [1] float32, a static scale instead of row_scale. weight, bias:
    [K]. scale, shift: rows stride_scale and stride_shift apart, each of so many tokens.
    GROUPS: groups of 256 columns, each number a power of two, which cover the row from STARTS on:
    a block of Triton's is a power of two wide, and one alone would compute up to twice the row.
    EXACT: they end where the row ends. INTERLEAVE: columns are stored in that order, K % 128 = 0.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * stride_x
    stored += row * K
    if scale is not None:
        scale += row // tokens_scale * stride_scale
    if shift is not None:
        shift += row // tokens_shift * stride_shift
    parts = ()
    for i in tl.static_range(len(GROUPS)):
        parts = parts + (_load(x, STARTS[i], K, GROUPS[i], EXACT),)
    mean = 0.0
    inverse = 1.0
    if NORM != "":
        mean, inverse = _norm(parts, K, eps, STARTS, GROUPS, NORM, EXACT)
    values = ()
    largest = 0.0
    for i in tl.static_range(len(GROUPS)):
        value = parts[i]
        if PREPARE:
            value = _prepare(
                *(value, mean, inverse, weight, bias, scale, shift),
                *(STARTS[i], K, GROUPS[i], NORM, GELU, EXACT),
            )
        if ROTATE:
            # From the dtype of x, as it would be read after a step of its own.
            value = _rotate(value.to(x.dtype.element_ty), GROUPS[i])
        value = value.to(tl.float32)
        largest = _larger(largest, _largest(value))
        values = values + (value,)
    STATIC: tl.constexpr = input_scale is not None
    unit = UNIT if ROTATE else 1.0
    step = _step(largest * unit, row_scale + row, input_scale, LIMIT, STATIC)
    unstep = tl.div_rn(1.0, step) * unit
    for i in tl.static_range(len(GROUPS)):
        _store(
            *(stored, values[i], unstep, STARTS[i], K, GROUPS[i]),
            *(LIMIT, ROTATE, STATIC, EXACT, INTERLEAVE),
        )
