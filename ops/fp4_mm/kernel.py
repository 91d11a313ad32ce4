"""The Triton kernel behind `fp4_mm` for few tokens, which decodes the weight as it multiplies."""

import triton
import triton.language as tl

from ..decode_fp4.kernel import NVFP4_GROUP, decode, load_words, to_bytes, to_value


@triton.jit
def _weight(codes, words, count, DTYPE: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr):
    """Return E2M1 times the scale of its block, [BLOCK_N, BLOCK_K] of DTYPE, exact.

    RAGGED: only the first `count` blocks are the weight's; what others' padding holds, NaN
    included, counts for nothing.
    """
    value = decode(codes, DTYPE)
    factor = to_value(to_bytes(words), GROUP)
    if RAGGED:
        factor = tl.where((tl.arange(0, factor.shape[1]) < count)[None, :], factor, 0.0)
    factor = factor[:, :, None]
    BLOCKS: tl.constexpr = value.shape[1] // GROUP
    blocks = tl.reshape(value, (value.shape[0], BLOCKS, GROUP))
    if tl.float16 == DTYPE and GROUP != NVFP4_GROUP:
        # Powers of two have a wider range than FP16.
        blocks = (blocks.to(tl.float32) * factor).to(DTYPE)
    else:
        blocks = blocks * factor.to(DTYPE)
    return tl.reshape(blocks, (value.shape[0], value.shape[1]))


@triton.jit(do_not_specialize=["M"])
def fp4_mm_kernel(
    x,
    packed,
    scale,
    tensor_scale,
    bias,
    out,
    M,
    N,
    K,
    columns,
    words,
    stride_x,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    RAGGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] = tensor_scale · (x · Wᵀ) + bias; with SPLITS, [SPLITS, M, N] float32, sums alone.

    x: [M, K] FP16 or BF16, K-contiguous, stride_x apart. packed: [≥ N, columns / 2] uint8. scale:
    words of the swizzled scales, `words` a row. tensor_scale: [1] float32 or None. bias: [N].
    RAGGED: a row has scales, or codes, that are padding.
    The tile is transposed, W · xᵀ: tensor cores take their left operand from registers.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    if PDL:
        # Nothing is read or written above; see `scaled_mm`'s kernel.
        tl.extra.cuda.gdc_wait()
    num_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    rows = tile // num_m * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile % num_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < N
    in_tokens = tokens < M
    steps = tl.cdiv(columns, BLOCK_K)
    # Of a split; the last has fewer.
    count = tl.cdiv(steps, SPLITS)
    first = split * count
    last = min(first + count, steps)
    at_w = packed + rows.to(tl.int64)[:, None] * (columns // 2)
    at_x = x + tokens.to(tl.int64)[:, None] * stride_x
    WORDS: tl.constexpr = BLOCK_K // GROUP // 4
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(first, last):
        half = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        inside = in_rows[:, None] & (half < columns // 2)[None, :]
        codes = tl.load(at_w + half[None, :], mask=inside, other=0)
        some = load_words(scale, rows, in_rows, step * WORDS, words, WORDS)
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        value = tl.load(at_x + k[None, :], mask=in_tokens[:, None] & (k < K)[None, :], other=0.0)
        count = tl.cdiv(K - step * BLOCK_K, GROUP)
        acc = tl.dot(_weight(codes, some, count, DTYPE, GROUP, RAGGED), value.T, acc)
    inside = in_tokens[:, None] & in_rows[None, :]
    at = tokens.to(tl.int64)[:, None] * N + rows[None, :]
    if SPLITS == 1:
        if tensor_scale is not None:
            acc *= tl.load(tensor_scale)
        if bias is not None:
            acc += tl.load(bias + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, acc.T.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + split.to(tl.int64) * M * N + at, acc.T, mask=inside)


@triton.jit(do_not_specialize=["size"])
def add_splits_kernel(
    sums,
    tensor_scale,
    bias,
    out,
    size,
    N,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = tensor_scale · (the sum of SPLITS rows of sums [SPLITS, size]) + bias; size = M · N."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(SPLITS):
        total += tl.load(sums + i * size + at, mask=inside, other=0.0)
    if tensor_scale is not None:
        total *= tl.load(tensor_scale)
    if bias is not None:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
