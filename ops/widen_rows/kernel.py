"""The Triton kernel behind `widen_rows`: one pass over h, and over x only where h is large."""

import triton
import triton.language as tl

LIMIT: tl.constexpr = tl.constexpr(448.0)
# As in reference.py.
MOST: tl.constexpr = tl.constexpr(2.0**60)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["M"])
def widen_rows_kernel(
    h,
    stored,
    scale,
    scale_up,
    scale_weight,
    out,
    M,
    K,
    R,
    stride_h,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [M, R] = h · scale_up / (scale · scale_weight), ROWS rows a program, RANK >= R.

    stored [M, K] and scale [M] are written to where h is larger than LIMIT in these units.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK)
    in_m = rows < M
    inside = in_m[:, None] & (ranks < R)[None, :]
    wide = rows.to(tl.int64)[:, None]
    value = tl.load(h + wide * stride_h + ranks[None, :], mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scale_up) / tl.load(scale_weight)
    old = tl.load(scale + rows, mask=in_m, other=1.0)
    need = tl.reduce(tl.abs(value), 1, _larger) / LIMIT
    # False for NaN too. Other layers read such a row of x as it is.
    finite = need < float("inf")
    large = (need > old) & finite
    ratio = need / old
    grown = tl.where(ratio < MOST, old * tl.exp2(tl.ceil(tl.log2(ratio))), need)
    new = tl.where(large, grown, old)
    code = tl.where(finite[:, None], value / new[:, None], float("nan")).to(out.dtype.element_ty)
    tl.store(out + wide * R + ranks[None, :], code, mask=inside)
    if tl.max(large.to(tl.int32), axis=0) > 0:
        tl.store(scale + rows, new, mask=large & in_m)
        factor = (old / new)[:, None]
        for start in range(0, K, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            at = stored + wide * K + columns[None, :]
            there = (large & in_m)[:, None] & (columns < K)[None, :]
            x = tl.load(at, mask=there, other=0.0).to(tl.float32) * factor
            tl.store(at, x.to(stored.dtype.element_ty), mask=there)
