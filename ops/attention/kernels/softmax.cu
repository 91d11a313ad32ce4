// The arithmetic of a tile: Q·Kᵀ, the exponentials, P as an operand, P·V. See machine.cu.

// The 64 rows of Q of a warpgroup: in shared memory, or in the registers of its threads.
#if Q_IN_REGISTERS
struct Query {
    u32 x[16];
};
__device__ __forceinline__ void load(Query& q, u32 address) {
    int lane = threadIdx.x % 32;
    u32 row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        u32 chunk = i / 2 ^ row % 8;
        u32 at = address + (row + i % 2 * 8) * D + chunk * 16 + lane % 4 * 4;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(q.x[i]) : "r"(at) : "memory");
    }
}
#else
struct Query {
    u64 x;
};
__device__ __forceinline__ void load(Query& q, u32 address) { q.x = descriptor(address); }
#endif

// s = Q·Kᵀ for 64 rows and 128 keys.
__device__ __forceinline__ void multiply_qk(int (&s)[64], const Query& q, u64 k) {
#pragma unroll
    for (int step = 0; step < D / 32; ++step)
#if Q_IN_REGISTERS
        mma_s8(s, q.x + 4 * step, k + 2 * step, step != 0);
#else
        mma_s8(s, q.x + 2 * step, k + 2 * step, step != 0);
#endif
}

#if PV == PV_EXACT
constexpr int P_REGISTERS = 32;
typedef float Sum;
__device__ __forceinline__ void multiply_pv(Sum (&o)[64], const u32 (&p)[P_REGISTERS], u64 v,
                                            bool add) {
#pragma unroll
    for (int step = 0; step < N / 16; ++step) mma_p(o, p + 4 * step, v + 128 * step, 1);
}
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn." HALF "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
#else
constexpr int P_REGISTERS = 16;
#if PV == PV_FP8
typedef float Sum;
#else
typedef int Sum;
#endif
__device__ __forceinline__ void multiply_pv(Sum (&o)[SUMS], const u32 (&p)[P_REGISTERS], u64 v,
                                            bool add) {
#pragma unroll
    for (int step = 0; step < N / 32; ++step)
        mma_p(o, p + 4 * step, v + 2 * step, step != 0 || add);
}
// Four numbers as bytes: E4M3; or codes, which come times the least FP16, whose bits are then they.
__device__ __forceinline__ u32 pack(float a, float b, float c, float d) {
#if PV == PV_FP8
    u32 r;
    asm("{\n.reg .b16 x, y;\ncvt.rn.satfinite.e4m3x2.f32 x, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 y, %4, %3;\nmov.b32 %0, {x, y};\n}\n"
        : "=r"(r) : "f"(a), "f"(b), "f"(c), "f"(d));
    return r;
#else
    u32 low, high;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(b), "f"(a));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(d), "f"(c));
    return __byte_perm(low, high, 0x6420);
#endif
}
#endif

// The accumulator of a thread as the A operand: see the layouts above.
__device__ __forceinline__ void pack_all(u32 (&out)[P_REGISTERS], const float (&p)[64]) {
#if PV == PV_EXACT
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i] = pack(p[2 * i], p[2 * i + 1]);
#else
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        out[2 * i] = pack(p[8 * i], p[8 * i + 1], p[8 * i + 4], p[8 * i + 5]);
        out[2 * i + 1] = pack(p[8 * i + 2], p[8 * i + 3], p[8 * i + 6], p[8 * i + 7]);
    }
#endif
}

// What a thread keeps of its two rows (8 apart).
struct Rows {
    float scale[2];  // of Q, softmax's included
    float top[2];    // P is 2 to the (logit - top)
    float sum[2];    // of P, this thread's columns; not FP8
    float keep[2];   // factor of what was summed before this tile
    float part[2];   // INT8: factor of this tile's P·V
    float pending[2];  // INT8: factor of the tile whose P·V came to `acc` last
    u32 codes[2];      // INT8: sum of this thread's codes since `acc` began
    // INT8: `acc` begins with this tile's P·V, as it might leave its range. For all rows of a warp:
    // the last bits of one depend on the others.
    bool begin;
    u32 zero;          // 0, which the compiler does not know
};

__device__ __forceinline__ float largest(const int (&s)[64], int row) {
    int x = s[2 * row], y = s[2 * row + 1];
#pragma unroll
    for (int i = 4; i < 64; i += 8) {
        x = max(max(x, s[i + 2 * row]), s[i + 2 * row + 1]);
        if (i + 4 < 64) y = max(max(y, s[i + 4 + 2 * row]), s[i + 5 + 2 * row]);
    }
    x = max(x, y);
    return x == EMPTY ? __int_as_float(0xff800000) : float(x);
}
__device__ __forceinline__ float largest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

// top: a thread's maxima, or its rows'. Moves the rows' top where a tile exceeds the limit, and
// returns whether any of the warp's did. Mostly none does, and the rows' maxima are not needed.
__device__ __forceinline__ bool follow(Rows& rows, const float (&top)[2]) {
    bool exceeds = top[0] - rows.top[0] > LIMIT || top[1] - rows.top[1] > LIMIT;
    if (!__any_sync(0xffffffff, exceeds)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float next = fmaxf(rows.top[r], largest_of_row(top[r]) - SHIFT);
        rows.keep[r] = exp2(rows.top[r] - next);
        rows.sum[r] *= rows.keep[r];
        rows.top[r] = next;
    }
    return true;
}

// x, but not before y is there: the compiler would do the cheap arithmetic of all elements first,
// and then wait for one exponential after the other.
__device__ __forceinline__ float after(float x, float y, u32 zero) {
    float r;
    asm("lop3.b32 %0, %1, %2, %3, 0x78;" : "=f"(r) : "f"(x), "f"(y), "r"(zero));
    return r;
}

// p[FROM..FROM + 31] = 2 to (logit + more). FAR: to (logit + more + CODE), the logit rounded first:
// of the largest nothing but CODE is left, however large it is.
template <bool FIRST, bool FAR, int FROM>
__device__ __forceinline__ void exponentials(float (&p)[64], const int (&s)[64], const Rows& rows,
                                             const float (&factor)[2], const float (&more)[2],
                                             float (&sum)[4]) {
    float added[2] = {more[0], more[1]};
#pragma unroll
    for (int chunk = FROM; chunk < FROM + 32; chunk += 8) {
#pragma unroll
        for (int i = chunk; i < chunk + 8; ++i) {
            float f = factor[(i / 2) % 2], a = added[(i / 2) % 2];
            float x = FAR ? __fmul_rn(float(s[i]), f) + a : fmaf(float(s[i]), f, a);
            p[i] = exp2(FAR && PV == PV_INT8 ? x + CODE : x);
            if (FIRST && s[i] == EMPTY) p[i] = 0.0f;
            if (PV == PV_EXACT) sum[i % 4] += p[i];
        }
        if (PACED) {
            added[0] = after(more[0], p[chunk + 5], rows.zero);
            added[1] = after(more[1], p[chunk + 7], rows.zero);
        }
    }
}

// p = the exponentials of a tile, to be packed. Returns whether sums before it must be multiplied
// by `keep`. BOUNDED: no logit can overflow, so that the maximum need not be known beforehand: for
// FP8, which has a narrow range, it is looked for beside the exponentials. INT8 scales each tile.
// FAR: the top may be so large that rounding it would move P.
template <bool FIRST, bool BOUNDED, bool FAR>
__device__ __forceinline__ bool softmax(float (&p)[64], const int (&s)[64], Rows& rows,
                                        float k_scale) {
    float factor[2] = {rows.scale[0] * k_scale, rows.scale[1] * k_scale};
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float top[2], more[2];
    bool moved = false;
    if constexpr (FIRST || !BOUNDED || PV != PV_EXACT) {
        // Codes must not exceed the largest: INT8's is never too low.
#pragma unroll
        for (int r = 0; r < 2; ++r)
            top[r] = PV == PV_INT8 && !FAR ? __fmul_ru(largest(s, r), factor[r])
                                           : __fmul_rn(largest(s, r), factor[r]);
    }
    if constexpr (FIRST || PV == PV_INT8) {
#pragma unroll
        for (int r = 0; r < 2; ++r) top[r] = largest_of_row(top[r]);
    }
    if constexpr (FIRST) {
#pragma unroll
        for (int r = 0; r < 2; ++r) rows.top[r] = top[r] - SHIFT;
    } else if constexpr (!BOUNDED) {
        moved = follow(rows, top);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float less = 0.0f;
        if (PV != PV_INT8) {
            more[r] = -rows.top[r];
        } else if (FAR) {
            more[r] = -top[r];
        } else {
            more[r] = __fadd_rd(CODE, -top[r]);
            // What rounding has taken off the codes.
            less = CODE - (more[r] + top[r]);
        }
        if (PV == PV_INT8) rows.part[r] = exp2(top[r] - rows.top[r] + less);
    }
    exponentials<FIRST, FAR, 0>(p, s, rows, factor, more, sum);
    if constexpr (!FIRST && BOUNDED && PV == PV_FP8) {
        moved = follow(rows, top);
        if (moved) {
#pragma unroll
            for (int i = 0; i < 32; ++i) p[i] *= rows.keep[(i / 2) % 2];
#pragma unroll
            for (int r = 0; r < 2; ++r) more[r] = -rows.top[r];
        }
    }
    exponentials<FIRST, FAR, 32>(p, s, rows, factor, more, sum);
    if (PV == PV_EXACT) {
        rows.sum[0] += sum[0] + sum[1];
        rows.sum[1] += sum[2] + sum[3];
    }
    return moved;
}

// Of the biases of a tile: 0 if all are, NaN if one is, else finite.
__device__ __forceinline__ float any_bias(u32 address) {
    float any;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(any) : "r"(address + N * 4) : "memory");
    return any;
}

// The same for a tile of which some keys are hidden or have another bias; `address` has the biases.
template <bool FIRST>
__device__ __forceinline__ bool softmax_biased(float (&p)[64], const int (&s)[64], Rows& rows,
                                               float k_scale, u32 address) {
    float factor[2] = {rows.scale[0] * k_scale, rows.scale[1] * k_scale};
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float top[2] = {__int_as_float(0xff800000), __int_as_float(0xff800000)};
    bool moved = false;
#pragma unroll
    for (int j = 0; j < 64; j += 4) {
        // The compiler would load more ahead than there are registers.
        if (PV == PV_INT8 && j % 16 == 0) __syncwarp();
        float x, y;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(x), "=f"(y) : "r"(address + threadIdx.x % 4 * 8 + 8 * j) : "memory");
#pragma unroll
        for (int i = j; i < j + 4; ++i) {
            int r = (i / 2) % 2;
            p[i] = fmaf(float(s[i]), factor[r], i % 2 ? y : x);
            top[r] = fmaxf(top[r], p[i]);
        }
    }
#if PV == PV_INT8
    // A scale that is NaN or Inf, a bias that is NaN: maxima drop it, and codes cannot hold it.
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] += 0.0f * (factor[r] + any_bias(address));
#endif
    if constexpr (FIRST) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = largest_of_row(top[r]);
            rows.top[r] = fmaxf(top[r] - SHIFT, FLOOR);
        }
    } else {
        if (PV == PV_INT8) {
            top[0] = largest_of_row(top[0]);
            top[1] = largest_of_row(top[1]);
        }
        moved = follow(rows, top);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (PV == PV_INT8) rows.part[r] = exp2(top[r] - rows.top[r]);
        top[r] = PV == PV_INT8 ? fmaxf(top[r], FLOOR) : rows.top[r];
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        p[i] -= top[(i / 2) % 2];
        p[i] = exp2(PV == PV_INT8 ? p[i] + CODE : p[i]);
        if (PV == PV_EXACT) sum[i % 4] += p[i];
    }
    if (PV == PV_EXACT) {
        rows.sum[0] += sum[0] + sum[1];
        rows.sum[1] += sum[2] + sum[3];
    }
    return moved;
}

// INT8: the sums of P as it is multiplied, from its bytes.
__device__ __forceinline__ void add_sums(Rows& rows, const u32 (&p)[P_REGISTERS]) {
#if PV == PV_INT8
    u32 sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < P_REGISTERS; ++i) sum[i % 2] = __dp4a(p[i], 0x01010101u, sum[i % 2]);
    rows.codes[0] += sum[0];
    rows.codes[1] += sum[1];
    rows.begin = __any_sync(0xffffffff, max(rows.codes[0], rows.codes[1]) > MOST_CODES);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (rows.begin) rows.codes[r] = sum[r];
        rows.sum[r] = fmaf(float(sum[r]), rows.part[r], rows.sum[r]);
    }
#endif
}
