"""The Triton kernels of `mxfp4_mm`: what rounds the activation, and the block-scaled product.

The product needs `tl.dot_scaled` in MXFP4 on tensor cores, which Triton has for compute capability
10.0 and 12.0; below it decodes to bf16 and multiplies that.
"""

import triton
import triton.language as tl

from ..decode_fp4.kernel import load_words, to_bytes

GROUP = tl.constexpr(32)
MANTISSA = tl.constexpr(23)
# The exponent of E2M1's largest power of two, and codes of E8M0: of zeros, of one, of NaN.
TOP = tl.constexpr(2)
E8M0_ONE = tl.constexpr(127)
E8M0_NAN = tl.constexpr(255)


@triton.jit
def _rounded(y):
    """Return y >= 0 rounded to E2M1's magnitudes, ties to even, at most 6; float32."""
    low = (y > 0.25).to(tl.float32) + (y >= 0.75).to(tl.float32) + (y > 1.25).to(tl.float32)
    low += (y >= 1.75).to(tl.float32)
    high = (y > 2.5).to(tl.float32) + (y >= 3.5).to(tl.float32) + 2.0 * (y > 5.0).to(tl.float32)
    return 0.5 * low + high


@triton.jit
def _inverse(code):
    """Return 2^(127 - code), float32, for codes up to 253."""
    return ((254 - code) << MANTISSA).to(tl.float32, bitcast=True)


@triton.jit
def _squared_error(magnitude, code):
    """Return the sum over each block of (rounded - exact)², in units of scale²."""
    y = magnitude * _inverse(code)[:, :, None]
    wrong = _rounded(y) - y
    return tl.sum(wrong * wrong, axis=2)


@triton.jit
def quantize_mxfp4_kernel(
    x,
    packed,
    scale,
    M,
    K,
    columns,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """packed [M, columns / 2] and scale [M, columns / 32], uint8, of x [M, K], K-contiguous.

    The even column is the high nibble. Each block has the scale by which its largest value may be
    cut off at 6, or twice that, whichever errs less.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = (rows < M)[:, None]
    at = x + rows.to(tl.int64)[:, None] * stride_x + column[None, :]
    value = tl.load(at, mask=in_rows & (column < K)[None, :], other=0.0).to(tl.float32)
    blocks = tl.reshape(value, (ROWS, COLUMNS // GROUP, GROUP))
    magnitude = tl.abs(blocks)
    largest = tl.max(magnitude, axis=2)
    finite = tl.min((magnitude < float("inf")).to(tl.int32), axis=2) == 1
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> MANTISSA, 254)
    code = tl.maximum(exponent - TOP, 1)
    # In units of the first scale.
    wider = 4.0 * _squared_error(magnitude, code + 1) < _squared_error(magnitude, code)
    code = tl.where(wider, code + 1, code)
    empty = largest == 0
    y = tl.where(empty[:, :, None], 0.0, magnitude * _inverse(code)[:, :, None])
    # Twice a magnitude is 0 to 4, 6, 8 or 12; its code 0 to 7.
    halves = (2.0 * _rounded(y)).to(tl.int32)
    stored = halves - (halves > 4).to(tl.int32) - (halves > 6).to(tl.int32)
    stored -= 3 * (halves > 8).to(tl.int32)
    negative = (blocks.to(tl.int32, bitcast=True) < 0) & (~empty)[:, :, None]
    stored = (stored | (negative.to(tl.int32) << 3)).to(tl.uint8)
    high, low = tl.split(tl.reshape(stored, (ROWS, COLUMNS // 2, 2)))
    half = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    at = packed + rows.to(tl.int64)[:, None] * (columns // 2) + half[None, :]
    tl.store(at, (high << 4) | low, mask=in_rows & (half < columns // 2)[None, :])
    code = tl.where(finite, tl.where(empty, 0, code), E8M0_NAN)
    block = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    at = scale + rows.to(tl.int64)[:, None] * (columns // GROUP) + block[None, :]
    tl.store(at, code.to(tl.uint8), mask=in_rows & (block < columns // GROUP)[None, :])


@triton.jit
def mxfp4_mm_kernel(
    x,
    x_scale,
    packed,
    scale,
    bias,
    out,
    zero,
    M,
    N,
    K,
    columns,
    words,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out [M, N] = x · Wᵀ + bias, both in MXFP4.

    x: [M, columns / 2], x_scale: [M, columns / 32], as `quantize_mxfp4_kernel` gives them. packed:
    [≥ N, columns / 2] uint8, nibbles in the same order. scale: words of the swizzled scales,
    `words` a row. bias: [N] or None. zero: 0.0.
    """
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # GROUP_M row tiles share columns in the L2 cache.
    width = GROUP_M * num_n
    first = tl.program_id(0) // width * GROUP_M
    height = min(num_m - first, GROUP_M)
    tokens = (first + tl.program_id(0) % width % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(0) % width // height * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tokens, in_rows = tokens < M, rows < N
    at_x = x + tokens.to(tl.int64)[:, None] * (columns // 2)
    at_scale = x_scale + tokens.to(tl.int64)[:, None] * (columns // GROUP)
    at_w = packed + rows.to(tl.int64)[:, None] * (columns // 2)
    WORDS: tl.constexpr = BLOCK_K // GROUP // 4
    # Triton 3.6 fails on SM100 where a product in a loop begins at a constant.
    acc = tl.full((BLOCK_M, BLOCK_N), zero, tl.float32)
    for step in range(0, tl.cdiv(columns, BLOCK_K)):
        half = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        block = step * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
        inside = (half < columns // 2)[None, :]
        left = tl.load(at_x + half[None, :], mask=in_tokens[:, None] & inside, other=0)
        right = tl.load(at_w + half[None, :], mask=in_rows[:, None] & inside, other=0)
        # What the padding of the scales holds counts for nothing.
        counts = (block < tl.cdiv(K, GROUP))[None, :]
        x_scales = tl.load(
            at_scale + block[None, :], mask=in_tokens[:, None] & counts, other=E8M0_ONE
        )
        some = to_bytes(load_words(scale, rows, in_rows, step * WORDS, words, WORDS))
        w_scales = tl.where(counts, some, E8M0_ONE).to(tl.uint8)
        acc = tl.dot_scaled(left, x_scales, "e2m1", right.T, w_scales, "e2m1", acc=acc)
    if bias is not None:
        acc += tl.load(bias + rows, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    at = out + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=in_tokens[:, None] & in_rows[None, :])
