"""The Triton kernel behind `scaled_mm`: one persistent kernel for INT8 and FP8, all architectures.

Each program walks over output tiles; what follows the sums is applied to the accumulator in
registers, so that nothing but the result is written. Operands come through TMA descriptors (SM90
and later) or through pointers, a constexpr choice.
"""

import triton
import triton.language as tl

# Columns of K, and of N, that share a scale.
BLOCK: tl.constexpr = tl.constexpr(128)
# 2 · log2(e) · √(2/π), and the same times 0.044715: gelu's cubic, for exp2.
LINEAR: tl.constexpr = tl.constexpr(2.302208198144325)
CUBIC: tl.constexpr = tl.constexpr(0.1029432395800235)


@triton.jit
def _tile(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Return (row, column) of an output tile, in groups of rows that share columns in the L2."""
    in_group = GROUP_M * num_n
    first_m = (tile // in_group) * GROUP_M
    rows = min(num_m - first_m, GROUP_M)
    within = tile % in_group
    return first_m + within % rows, within // rows


@triton.jit
def _load(x, rows, inside, step, K, stride, BLOCK_K: tl.constexpr):
    """Return BLOCK_K columns of the rows of x, zero outside."""
    columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < K)[None, :], other=0.0)


@triton.jit
def _scaled(
    acc,
    scale_a,
    scale_b,
    zero_point,
    column_sum,
    rows,
    columns,
    in_m,
    in_n,
    SCALE_A: tl.constexpr,
    SCALE_B: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
):
    """Return scale_a · scale_b · (acc − zero_point · column_sum) of a tile, float32."""
    if HAS_ZERO_POINT:
        point = tl.load(zero_point + rows, mask=in_m, other=0)
        total = tl.load(column_sum + columns, mask=in_n, other=0)
        acc -= point[:, None] * total[None, :]
    value = acc.to(tl.float32)
    if SCALE_A == "row":
        value *= tl.load(scale_a + rows, mask=in_m, other=0.0)[:, None]
    elif SCALE_A == "one":
        value *= tl.load(scale_a)
    if SCALE_B == "row":
        value *= tl.load(scale_b + columns, mask=in_n, other=0.0)[None, :]
    elif SCALE_B == "one":
        value *= tl.load(scale_b)
    return value


@triton.jit
def _gelu_tanh(x):
    """Return x · (1 + tanh(u)) / 2 as x / (1 + exp(−2u)), float32.

    So written, a negative x loses no digits to 1 + tanh, and no finite x gives NaN; −Inf does, as
    in torch.
    """
    return x / (1.0 + tl.exp2(-x * (LINEAR + CUBIC * x * x)))


@triton.jit
def _part(x, INDEX: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Return one of the PARTS, a power of two, that stand side by side in x [M, N].

    Each thread keeps what it has: of the registers that hold x, it is left with a part.
    """
    if PARTS == 1:
        return x
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))
        half = left if INDEX < PARTS // 2 else right
        return _part(half, INDEX % (PARTS // 2), PARTS // 2, M, N // 2)


@triton.jit
def _bits(x, rows, inside, stride, COUNT: tl.constexpr):
    """Return the rows of x [·, COUNT], 16 bits, zero outside.

    Triton puts all that is loaded as it is multiplied in shared memory. Loaded as integers, a left
    operand goes to the tensor cores from registers, and leaves room for the pipeline.
    """
    at = rows.to(tl.int64)[:, None] * stride + tl.arange(0, COUNT)[None, :]
    bits = tl.load(x.to(tl.pointer_type(tl.int16), bitcast=True) + at, inside[:, None], 0)
    return bits.to(x.dtype.element_ty, bitcast=True)


@triton.jit
def _with_low_rank(
    value,
    h,
    u,
    rows,
    in_m,
    columns,
    in_n,
    stride_h,
    stride_u,
    RANK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Return value + h·uᵀ of a tile, float32, PIECE columns of h and u at a time; 0: all."""
    if PIECE == 0:
        left = _bits(h, rows, in_m, stride_h, RANK)
        value = tl.dot(left, _bits(u, columns, in_n, stride_u, RANK).T, value)
    else:
        # One stage: pieces that are loaded ahead would stand in shared memory beside the pipeline.
        # A loop beside that over K keeps Triton from flattening the outer one.
        for first in tl.range(0, RANK, PIECE, num_stages=1):
            ranks = first + tl.arange(0, PIECE)
            of_h = h + rows.to(tl.int64)[:, None] * stride_h + ranks[None, :]
            of_u = u + columns.to(tl.int64)[:, None] * stride_u + ranks[None, :]
            in_r = (ranks < RANK)[None, :]
            left = tl.load(of_h, mask=in_m[:, None] & in_r, other=0.0)
            right = tl.load(of_u, mask=in_n[:, None] & in_r, other=0.0)
            value = tl.dot(left, right.T, value)
    return value


@triton.jit
def _finish(
    c,
    value,
    rows,
    start_n,
    M,
    N,
    bias,
    gate,
    residual,
    gate_tokens,
    stride_gate,
    stride_residual,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Store residual + gate · activation(value + bias) of a tile, WIDTH columns from start_n on."""
    columns = start_n + tl.arange(0, WIDTH)
    in_n = columns < N
    inside = (rows < M)[:, None] & in_n[None, :]
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_tanh":
        value = _gelu_tanh(value)
    if GATE_ROWS == "one":
        value *= tl.load(gate + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
    elif GATE_ROWS == "many":
        at = (rows // gate_tokens).to(tl.int64)[:, None] * stride_gate + columns[None, :]
        value *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = rows.to(tl.int64)[:, None] * stride_residual + columns[None, :]
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    at = c + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, value.to(c.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "step_scale_a", "gate_tokens"])
def scaled_mm_kernel(
    a,
    b,
    c,
    scale_a,
    scale_b,
    bias,
    zero_point,
    column_sum,
    gate,
    residual,
    h,
    u,
    M,
    N,
    K,
    stride_a,
    stride_b,
    step_scale_a,
    gate_tokens,
    stride_scale_a,
    stride_gate,
    stride_residual,
    stride_h,
    stride_u,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    USE_TMA: tl.constexpr,
    INTEGER: tl.constexpr,
    SCALE_A: tl.constexpr,
    SCALE_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE_ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    """C = residual + gate · activation(scale_a · scale_b · (A·Bᵀ − point) + H·Uᵀ + bias).

    a: [M, K], b: [N, K], both K-contiguous, pointers or TMA descriptors. c: [M, N], contiguous.
    SCALE_A, SCALE_B: "one", "row" ([M] or [N]) or, both, "block" ([M, ⌈K/128⌉] with strides
    stride_scale_a and step_scale_a; [⌈N/128⌉, ⌈K/128⌉], contiguous). bias: [N]. The point:
    zero_point [M] int32, of A, times column_sum [N] int32, of B along K. gate: [1 or R, N], for
    gate_tokens rows of C each. residual: [M, N]. h: [M, RANK], u: [N, RANK], 16 bits, PIECE columns
    at a time, 0 for all; RANK 0: none.
    """
    if PDL:
        # This grid may be set up while the kernel before it in the stream ends. Until the wait
        # returns, that kernel may still write what is read here (rows, scales), and may still read
        # memory that the allocator has since given to c. So nothing is read or written above it,
        # weights neither: a kernel may just have unpacked them. Every program waits, so that this
        # grid's end implies the end of all before it, for those that follow. The quantizers for it
        # call no gdc_launch_dependents: programs that come while others run slow the product down.
        tl.extra.cuda.gdc_wait()
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    BLOCKS: tl.constexpr = SCALE_A == "block"
    SUM: tl.constexpr = tl.int32 if INTEGER else tl.float32
    if BLOCKS:
        tl.static_assert(BLOCK_K == BLOCK and BLOCK % BLOCK_N == 0, "a tile has one scale of b")
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = _tile(tile, num_m, num_n, GROUP_M)
        start_m = tile_m * BLOCK_M
        start_n = tile_n * BLOCK_N
        rows = start_m + tl.arange(0, BLOCK_M)
        columns = start_n + tl.arange(0, BLOCK_N)
        in_m = rows < M
        in_n = columns < N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32 if BLOCKS else SUM)
        for step in range(steps):
            if USE_TMA:
                x = a.load([start_m, step * BLOCK_K])
                w = b.load([start_n, step * BLOCK_K])
            else:
                x = _load(a, rows, in_m, step, K, stride_a, BLOCK_K)
                w = _load(b, columns, in_n, step, K, stride_b, BLOCK_K)
            if BLOCKS:
                at = rows.to(tl.int64) * stride_scale_a + step * step_scale_a
                scale = tl.load(scale_a + at, mask=in_m, other=0.0)
                scale *= tl.load(scale_b + (start_n // BLOCK) * steps + step)
                acc += tl.dot(x, w.T, out_dtype=SUM).to(tl.float32) * scale[:, None]
            else:
                acc = tl.dot(x, w.T, acc, out_dtype=SUM)
        value = _scaled(
            acc,
            scale_a,
            scale_b,
            zero_point,
            column_sum,
            rows,
            columns,
            in_m,
            in_n,
            SCALE_A,
            SCALE_B,
            HAS_ZERO_POINT,
        )
        if RANK:
            value = _with_low_rank(
                value, h, u, rows, in_m, columns, in_n, stride_h, stride_u, RANK, PIECE
            )
        for part in tl.static_range(PARTS):
            _finish(
                c,
                _part(value, part, PARTS, BLOCK_M, BLOCK_N),
                rows,
                start_n + part * (BLOCK_N // PARTS),
                M,
                N,
                bias,
                gate,
                residual,
                gate_tokens,
                stride_gate,
                stride_residual,
                BLOCK_N // PARTS,
                HAS_BIAS,
                ACTIVATION,
                GATE_ROWS,
                HAS_RESIDUAL,
            )
