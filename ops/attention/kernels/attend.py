"""The Triton kernel of `attention`: every GPU since Ampere, every head size, masks."""

import triton
import triton.language as tl

TILE: tl.constexpr = tl.constexpr(128)
ROUND: tl.constexpr = tl.constexpr(12582912.0)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# P·V in 16 bits, in FP8, in INT8.
EXACT: tl.constexpr = tl.constexpr(0)
FP8: tl.constexpr = tl.constexpr(1)
INT8: tl.constexpr = tl.constexpr(2)
# log2 of E4M3 P's largest number, 448, which P must not exceed.
FP8_SHIFT: tl.constexpr = tl.constexpr(8.75)
# Unsigned 8-bit P is stored less this, as a signed number.
OFFSET: tl.constexpr = tl.constexpr(128.0)
UINT8_MAX: tl.constexpr = tl.constexpr(255.0)
NO_MASK: tl.constexpr = tl.constexpr(0)
BOOL_MASK: tl.constexpr = tl.constexpr(1)
ADDED_MASK: tl.constexpr = tl.constexpr(2)


@triton.jit
def _logits(
    x,
    s,
    scale,
    mask,
    row,
    key,
    ROWS,
    KEYS,
    mask_q,
    mask_k,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Return the logits of a tile in log2 units; -inf where a key does not count."""
    s = s.to(tl.float32) * scale
    inside = (key < KEYS)[None, :]
    if MASK != NO_MASK:
        at = mask + row.to(tl.int64)[:, None] * mask_q + key.to(tl.int64)[None, :] * mask_k
        given = tl.load(at, mask=inside & (row < ROWS)[:, None], other=0)
        if MASK == BOOL_MASK:
            inside = inside & (given != 0)
        else:
            s += given.to(tl.float32) * LOG2E
    if CAUSAL:
        inside = inside & (key[None, :] <= row[:, None])
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _part(t, own, base, scale, MASK: tl.constexpr):
    """Return by what the codes of a tile count, 2 to the (own - base); NaN where logits t have one.

    Integers cannot hold it, and maxima drop it: it comes of a scale, NaN or Inf, or of the mask.
    """
    part = tl.exp2(own - base) + (scale - scale)
    if MASK == ADDED_MASK:
        bad = tl.max((t != t).to(tl.int32), axis=1)
        part = tl.where(bad != 0, float("nan"), part)
    return part


@triton.jit
def attend_kernel(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    v_offset,
    v_sum,
    mask,
    out,
    lse,
    H,
    GROUP,
    ROWS,
    KEYS,
    D,
    v_b,
    v_h,
    v_l,
    v_d,
    mask_b,
    mask_h,
    mask_q,
    mask_k,
    out_b,
    out_h,
    out_l,
    out_d,
    TILES,
    BLOCKS,
    M: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PV: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """out = the attention of M rows of one head; the operands are those of `prepare.Prepared`.

    q, k, v: tiles that are not swizzled; where PV is EXACT, v [B, Hkv, KEYS, D] as it came, by its
    strides. One scale for each 128 keys. mask: broadcast by strides of zero. lse: [B·H, ROWS].
    A row that no key counts for gives zeros, and -inf for lse.
    """
    PER_TILE: tl.constexpr = TILE // M
    tl.static_assert(PV != INT8 or N == TILE, "v_sum is of whole tiles")
    tile = tl.program_id(0) % (TILES * PER_TILE)
    bh = (tl.program_id(0) // (TILES * PER_TILE)).to(tl.int64)
    b, h = bh // H, bh % H
    kv = bh // GROUP
    row = tile * M + tl.arange(0, M)
    column = tl.arange(0, WIDTH)
    padded = bh * TILES * TILE + row
    x = tl.load(q + padded[:, None] * WIDTH + column[None, :])
    scale_q = tl.load(q_scale + padded)
    mask += b * mask_b + h * mask_h
    inner = tl.arange(0, N)
    k_at = k + inner[:, None] * WIDTH + column[None, :]
    if PV == EXACT:
        v_at = v + b * v_b + (h // GROUP) * v_h + column.to(tl.int64)[None, :] * v_d
    else:
        v_at = v + column[:, None] * TILE + inner[None, :]
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, WIDTH), tl.float32)
    end = KEYS
    if CAUSAL:
        end = tl.minimum(KEYS, (tile + 1) * M)
    for start in range(0, end, N):
        tile_of = start // TILE
        within = start - tile_of * TILE
        block = kv * BLOCKS + tile_of
        key = start + inner
        y = tl.load(k_at + (kv * BLOCKS * TILE + start) * WIDTH)
        s = tl.dot(x, y.T, out_dtype=tl.int32)
        scale = scale_q * tl.load(k_scale + block)
        t = _logits(x, s, scale[:, None], mask, row, key, ROWS, KEYS, mask_q, mask_k, MASK, CAUSAL)
        highest = tl.max(t, axis=1)
        moved = tl.maximum(top, highest)
        # Where all is -inf, anything finite will do; NaN stays.
        base = tl.where(moved == float("-inf"), 0.0, moved)
        keep = tl.exp2(top - base)
        top = moved
        if PV == EXACT:
            p = tl.exp2(t - base[:, None])
            total = total * keep + tl.sum(p, axis=1)
            valid = (key < KEYS)[:, None] & (column < D)[None, :]
            w = tl.load(v_at + key.to(tl.int64)[:, None] * v_l, mask=valid, other=0.0)
            acc = tl.dot(p.to(w.dtype), w, acc * keep[:, None])
        elif PV == FP8:
            p = tl.exp2(t - (base - FP8_SHIFT)[:, None])
            total = total * keep + tl.sum(p, axis=1)
            w = tl.load(v_at + block * (TILE * WIDTH) + within)
            # Hopper's tensor cores cut sums off after some 14 bits: they sum a tile, no more.
            acc = tl.dot(p.to(w.dtype), w.T, acc * keep[:, None], max_num_imprecise_acc=N)
        else:
            # Codes over the tile's own maximum; its share is put right when it is added.
            own = tl.where(highest == float("-inf"), 0.0, highest)
            codes = tl.exp2(t - own[:, None]) * UINT8_MAX + (ROUND - OFFSET)
            codes = codes.to(tl.int32, bitcast=True).to(tl.int8)
            part = _part(t, own, base, scale, MASK)
            total = total * keep + (tl.sum(codes.to(tl.int32), axis=1) + 128 * N) * part
            w = tl.load(v_at + block * (TILE * WIDTH) + within)
            away = tl.load(v_sum + block * WIDTH + column)
            sum_v = tl.dot(codes, w.T, out_dtype=tl.int32).to(tl.float32) + OFFSET * away[None, :]
            acc = acc * keep[:, None] + sum_v * part[:, None]
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    if PV != EXACT:
        acc = acc * tl.load(v_scale + kv * WIDTH + column)[None, :]
        offset = tl.load(v_offset + kv * WIDTH + column)[None, :]
        acc += tl.where(empty[:, None], 0.0, offset)
    valid = (row < ROWS)[:, None] & (column < D)[None, :]
    at = b * out_b + h * out_h + row.to(tl.int64)[:, None] * out_l + column[None, :] * out_d
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid)
    if HAS_LSE:
        unit = 0.0
        if PV == FP8:
            unit = FP8_SHIFT
        elif PV == INT8:
            unit = 7.994353436858858
        value = tl.where(empty, float("-inf"), (tl.log2(total) + top - unit) * LN2)
        tl.store(lse + bh * ROWS + row, value, mask=row < ROWS)
