"""The Triton kernel of `attention_fp4`: both products are block-scaled NVFP4 ones.

Needs `tl.dot_scaled` in NVFP4, which Triton has for compute capability 10.0 and 12.0.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(16)
E2M1_MAX = tl.constexpr(6.0)
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def _to_e2m1(y):
    """Return the codes 0 to 7 (uint8) of y, 0 <= y <= 6 or a little above, rounded to nearest."""
    code = (y > 0.25).to(tl.uint8) + (y >= 0.75).to(tl.uint8) + (y > 1.25).to(tl.uint8)
    code += (y >= 1.75).to(tl.uint8) + (y > 2.5).to(tl.uint8) + (y >= 3.5).to(tl.uint8)
    return code + (y > 5.0).to(tl.uint8)


@triton.jit
def _quantize_p(p, M: tl.constexpr, N: tl.constexpr):
    """Return (packed [M, N/2], scales [M, N/16] E4M3) of p [M, N], 0 <= p <= 448 · 6.

    The even column is the low nibble, as `tl.dot_scaled` reads it.
    """
    blocks = tl.reshape(p, (M, N // GROUP, GROUP))
    scale = (tl.max(blocks, axis=2) * (1 / E2M1_MAX)).to(tl.float8e4nv)
    real = scale.to(tl.float32)
    inverse = tl.where(real == 0, 0.0, 1 / real)
    codes = _to_e2m1(blocks * inverse[:, :, None])
    low, high = tl.split(tl.reshape(codes, (M, N // 2, 2)))
    return low | (high << 4), scale


@triton.jit
def attend_kernel(
    q,
    q_scale,
    k,
    k_scale,
    v,
    v_scale,
    correction,
    out,
    out_b,
    out_l,
    logit_scale,
    v_factor,
    zero,
    ROWS,
    KEYS,
    PADDED,
    GROUP_HEADS,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
):
    """Write softmax(logit_scale · q·kᵀ) · v of M rows of one head to out.

    q: [heads, rows, D/2] packed, low nibble first, q_scale [heads, rows, D/16]; k alike; v: [heads,
    D, PADDED/2], packed along keys, v_scale [heads, D, PADDED/16]; rows and keys padded to tiles.
    correction: [heads, tiles of M rows, PADDED] float32, the mean query times the keys.
    logit_scale: [heads] float32, of q, k, the softmax and log2(e). v_factor: of each head of v.
    zero: 0.0.
    """
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    kv_head = head // GROUP_HEADS
    rows = tile * M + tl.arange(0, M)
    half, groups = tl.arange(0, D // 2), tl.arange(0, D // GROUP)
    width = tl.arange(0, D)
    at = head * tiles * M + rows
    q_tile = tl.load(q + at[:, None] * (D // 2) + half[None, :])
    q_scales = tl.load(q_scale + at[:, None] * (D // GROUP) + groups[None, :])
    factor = tl.load(logit_scale + head)
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for start in range(0, KEYS, N):
        keys = start + tl.arange(0, N)
        at_k = kv_head * PADDED + keys
        k_tile = tl.load(k + at_k[None, :] * (D // 2) + half[:, None])
        k_scales = tl.load(k_scale + at_k[:, None] * (D // GROUP) + groups[None, :])
        # Triton 3.6 fails on SM100 where a product in a loop begins at a constant.
        more = tl.load(correction + (head * tiles + tile) * PADDED + keys)
        more = tl.broadcast_to(more[None, :], (M, N))
        logits = tl.dot_scaled(q_tile, q_scales, "e2m1", k_tile, k_scales, "e2m1", acc=more)
        logits = tl.where(keys[None, :] < KEYS, logits * factor, float("-inf"))
        here = tl.max(logits, axis=1)
        new = tl.maximum(largest, here)
        # The first level: of each row within this tile, its largest value goes to 448 · 6.
        p = tl.exp2(logits - here[:, None])
        outer = tl.exp2(here - new)
        packed, scales = _quantize_p(p * (E4M3_MAX * E2M1_MAX), M, N)
        column = start // 2 + tl.arange(0, N // 2)
        at_v = kv_head * D + width
        v_tile = tl.load(v + at_v[None, :] * (PADDED // 2) + column[:, None])
        block = start // GROUP + tl.arange(0, N // GROUP)
        v_scales = tl.load(v_scale + at_v[:, None] * (PADDED // GROUP) + block[None, :])
        none = tl.full((M, D), zero, tl.float32)
        product = tl.dot_scaled(packed, scales, "e2m1", v_tile, v_scales, "e2m1", acc=none)
        shrink = tl.exp2(largest - new)
        acc = acc * shrink[:, None] + product * (outer * (1 / (E4M3_MAX * E2M1_MAX)))[:, None]
        total = total * shrink + tl.sum(p, axis=1) * outer
        largest = new
    place = out + head * out_b + rows.to(tl.int64)[:, None] * out_l + width[None, :]
    result = (acc / total[:, None] * tl.load(v_factor + kv_head)).to(out.dtype.element_ty)
    tl.store(place, result, mask=rows[:, None] < ROWS)
