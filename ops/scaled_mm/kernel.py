"""The Triton kernel behind `scaled_mm`: one persistent kernel for INT8 and FP8, all architectures.

Each program walks over output tiles; the scales, the zero-point correction and the bias are applied
to the accumulator in registers, so that nothing but the result is written. Operands come through
TMA descriptors (SM90 and later) or through pointers, a constexpr choice.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Return (row, column) of an output tile, in groups of rows that share columns in the L2."""
    in_group = GROUP_M * num_n
    first_m = (tile // in_group) * GROUP_M
    rows = min(num_m - first_m, GROUP_M)
    within = tile % in_group
    return first_m + within % rows, within // rows


@triton.jit(do_not_specialize=["M"])
def scaled_mm_kernel(
    a,
    b,
    c,
    scale_a,
    scale_b,
    bias,
    zero_point,
    column_sum,
    M,
    N,
    K,
    stride_a,
    stride_b,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    INTEGER: tl.constexpr,
    ROW_SCALE_A: tl.constexpr,
    ROW_SCALE_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """C = scale_a · scale_b · (A·Bᵀ − zero_point · column_sum) + bias.

    a: [M, K], b: [N, K], both K-contiguous, pointers or TMA descriptors. c: [M, N], contiguous.
    scale_a: [M] or [1], scale_b: [N] or [1]. bias: [N]. zero_point: [M] int32, of A; column_sum:
    [N] int32, of B along K.
    """
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _tile(tile, num_m, num_n, GROUP_M)
        start_m = tile_m * BLOCK_M
        start_n = tile_n * BLOCK_N
        rows = start_m + tl.arange(0, BLOCK_M)
        columns = start_n + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for step in range(steps):
            if USE_TMA:
                x = a.load([start_m, step * BLOCK_K])
                w = b.load([start_n, step * BLOCK_K])
            else:
                inner = step * BLOCK_K + tl.arange(0, BLOCK_K)
                valid = inner[None, :] < K
                x_at = a + rows.to(tl.int64)[:, None] * stride_a + inner[None, :]
                w_at = b + columns.to(tl.int64)[:, None] * stride_b + inner[None, :]
                x = tl.load(x_at, mask=valid & (rows[:, None] < M), other=0.0)
                w = tl.load(w_at, mask=valid & (columns[:, None] < N), other=0.0)
            acc = tl.dot(x, w.T, acc, out_dtype=ACC)
        in_m = rows < M
        in_n = columns < N
        if HAS_ZERO_POINT:
            point = tl.load(zero_point + rows, mask=in_m, other=0)
            total = tl.load(column_sum + columns, mask=in_n, other=0)
            acc -= point[:, None] * total[None, :]
        value = acc.to(tl.float32)
        if ROW_SCALE_A:
            value *= tl.load(scale_a + rows, mask=in_m, other=0.0)[:, None]
        else:
            value *= tl.load(scale_a)
        if ROW_SCALE_B:
            value *= tl.load(scale_b + columns, mask=in_n, other=0.0)[None, :]
        else:
            value *= tl.load(scale_b)
        if HAS_BIAS:
            value += tl.load(bias + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
        at = c + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, value.to(c.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
