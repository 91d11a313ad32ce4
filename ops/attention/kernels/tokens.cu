// The pre-pass of attention: Q, K and V to 8 bits, each read once from memory.
//
// survey.cu reads a sample, pack_rows.cu Q and K, pack_values.cu V. What is taken off the keys comes
// from the sample: softmax does not see it, whatever it is. So does what is taken off the values, which
// is put right at the end, and E4M3's scale of V, which has room to spare: a head that needs more is
// packed again. A token far away that is in the sample moves neither of what is taken off, and leaves
// the others the range that they would have without room. For a norm over all heads K is read twice,
// the second time from the L2 cache: blocks do one item after the other in an order in which the norms
// of some tiles come ahead of packing these. Integers have no room to spare: blocks hold their tiles of V
// until the range of the head is known, or, where the GPU cannot hold a head, read them twice.
//
// This file has what they share. prepass.py sets:
//   D               channels of a head, 64 or 128
//   X               dtype of Q, K and V
//   NORM            of the prologue: none, over a head's channels, over those of all heads
//   Q_WEIGHT, K_WEIGHT   dtype of the norm's weight, or ABSENT
//   Q_SPLIT, K_SPLIT     the weight has two rows: the first is for tokens before `first`
//   ANGLES          dtype of cos and sin, or ABSENT
//   ROTATE          Q and K are multiplied by a Hadamard matrix
//   GROUPS          scales of 128 keys: 4, of keys whose (key % 8) / 2 is the same, or 1
//   SWIZZLED        copies are as the Hopper kernel reads them: 16-byte chunk c of a row stands at
//                   c ^ (row % 8), V's keys in the order of ops/layout
//   SHIFT           what the log-sum-exp needs is written
//   V               what is stored of V: nothing, E4M3, or integers
//   Q_HEADS, K_HEADS     that an item packs, one after the other
//   SAMPLE          keys of the sample, at most
//   SURVEY_TOKENS   of these that a block of the survey has
//   RMS_ITEMS       items of a tile of K for its norms over all heads, a token for each warp
//   VALUE_TILES     tiles of a head of V that a block has, one after the other
//   LEFT_ROW        of sums that 16 keys of a tile leave; those of the next 16 are in other banks
//   PATIENCE        cycles that a block which holds tiles of V waits for others

enum Norm { NO_NORM = 0, HEAD = 1, TOKEN = 2 };
enum Stored { NOTHING = 0, E4M3 = 1, INTEGERS = 2 };

const int TILE = 128;
// Threads of a row, of a block, and the rows of a tile that it has at once.
const int LANES = D / WIDTH;
const int THREADS = 4 * D;
const int WARPS = THREADS / 32;
const int ROWS = THREADS / LANES;
const int STEPS = TILE / ROWS;
static_assert(RMS_ITEMS * WARPS == TILE, "all of a tile's tokens have a norm");
static_assert(GROUPS == 1 || 32 / LANES == 2, "the two rows of a warp are of one group");
static_assert(!SWIZZLED || D >= 128, "rows of 128 bytes and more are swizzled");
// A small float32 plus 1.5 · 2^23 is the nearest even integer, in the low bits of its mantissa.
const float ROUND = 12582912.0f;
// The smallest normal float32: the scale of zeros.
const float TINY = 1.1754943508222875e-38f;
const float LN2 = 0.6931471805599453f;

// Room for an item.
extern __shared__ __align__(16) char shared[];

struct Params {
    const char* q;
    const char* k;
    const char* v;
    char* q_codes;
    float* q_scale;
    float* q_bound;
    float* shift;
    char* k_codes;
    float* k_scale;
    float* k_bound;
    char* v_codes;
    float* v_scale;
    float* v_offset;
    float* v_sum;
    const char* q_weight;
    const char* k_weight;
    const char* cos;
    const char* sin;
    float* sample;     // [B, blocks of the survey, Hkv, D]: means over the tokens of each
    float* k_mean;     // [B·Hkv, D]
    float* v_sample;   // as `sample`
    float* v_sample_ends;  // [B, blocks of the survey, 2, Hkv, D]: maxima of V and of -V
    float* q_squares;  // [B·tiles, items, 128]: sums of the squares of a token's channels
    float* k_inverse;  // [B, Lk]: of the norm over all heads
    float* v_mean;     // [B·Hkv, D], of the sample
    u32* v_ends;       // [B·Hkv, 2, D]: maxima of V and of -V, as `ordered`
    float* v_left;     // [B·Hkv, tiles, D]: sums of what rounding took off, in steps of the codes
    u32* v_state;      // [B·Hkv]: AGAIN, and how many blocks of `hold_values` have told their range
    u32* done;
    long long q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l;
    int batches, heads, kv_heads, queries, keys, first, k_lag, row_items, v_held;
    float factor, limit, eps;
};

__device__ __forceinline__ int count_of(int length, int step) { return (length + step - 1) / step; }

// Items that are done, from `done` on: the ticket; mean keys; norms of each tile of Q and of K. Then
// whether a block of `hold_values` gave up.
struct Counters {
    u32 *ticket, *means, *q, *k, *gave_up, *end;

    __device__ __forceinline__ explicit Counters(const Params& p) {
        ticket = p.done, means = ticket + 1, q = means + 1;
        k = q + p.batches * count_of(p.queries, TILE);
        gave_up = k + p.batches * count_of(p.keys, TILE);
        end = gave_up + 1;
    }
};

// ---- what blocks tell each other

// Of all threads of a block, once it has written what others wait for.
__device__ __forceinline__ void tell(u32* counter) {
    __syncthreads();
    if (threadIdx.x == 0)
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// How many have told; what they wrote before is to be seen then.
__device__ __forceinline__ u32 told(const u32* counter) {
    u32 seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    return seen;
}
// Of one thread.
__device__ __forceinline__ void await(const u32* counter, u32 wanted) {
    while (told(counter) < wanted) __nanosleep(64);
}

// ---- sums over what blocks wrote, always in the same order

// sums[d] = the sum of `count` numbers that are `stride` apart from `from` + d on, for d < D. Ends
// with a barrier.
__device__ __forceinline__ void add_up(float* sums, const float* from, int count, int stride,
                                       float* room) {
    const int d = threadIdx.x % D, part = threadIdx.x / D, parts = THREADS / D;
    float sum = 0.0f;
#pragma unroll 16
    for (int i = part; i < count; i += parts) sum += __ldcg(from + (long long)i * stride + d);
    room[threadIdx.x] = sum;
    __syncthreads();
    if (part == 0) {
        for (int i = 1; i < parts; ++i) sum += room[i * D + d];
        sums[d] = sum;
    }
    __syncthreads();
}

// The mean of the sample of a head, also in shared memory, whose address is returned: each 16 blocks,
// or more, without the largest and the least, which may have a token that is far away. FP8's sums want
// the mean: tensor cores cut them off, and what is of one sign shrinks. Ends with a barrier.
__device__ __forceinline__ const float* mean_of_sample(const Params& p, const float* sample,
                                                       float* mean, int bh) {
    float* const room = reinterpret_cast<float*>(shared);
    float* const found = room + THREADS;
    const int blocks = count_of(min(p.keys, SAMPLE), SURVEY_TOKENS), groups = max(blocks / 16, 1);
    const int b = bh / p.kv_heads, h = bh % p.kv_heads, d = threadIdx.x % D, stride = p.kv_heads * D;
    const float* const from = sample + ((long long)b * blocks * p.kv_heads + h) * D + d;
    float all = 0.0f;
    for (int group = threadIdx.x / D; group < groups; group += THREADS / D) {
        float sum = 0.0f, largest = __ldcg(from + group * stride), least = largest;
        int count = 0;
#pragma unroll 8
        for (int i = group; i < blocks; i += groups, ++count) {
            const float x = __ldcg(from + i * stride);
            sum += x, largest = fmaxf(largest, x), least = fminf(least, x);
        }
        all += count < 3 ? sum / count : (sum - largest - least) / (count - 2);
    }
    room[threadIdx.x] = all;
    __syncthreads();
    if (threadIdx.x < D) {
        for (int i = D; i < THREADS; i += D) all += room[i + d];
        found[d] = mean[bh * D + d] = all / groups;
    }
    __syncthreads();
    return found;
}

// Of three numbers. One that is NaN counts for nothing.
__device__ __forceinline__ float middle_of(float a, float b, float c) {
    return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
}

// Where most of the sample of a head is: of each three blocks' means, a third of the sample apart, the
// one in the middle; the mean of these. A token far away is in one block, and not in the middle.
__device__ __forceinline__ void center_of_sample(const Params& p, const float* sample, float* center,
                                                 int bh) {
    float* const room = reinterpret_cast<float*>(shared);
    const int blocks = count_of(min(p.keys, SAMPLE), SURVEY_TOKENS);
    const int triples = blocks < 3 ? blocks : blocks / 3, apart = blocks < 3 ? 0 : triples;
    const int b = bh / p.kv_heads, h = bh % p.kv_heads, d = threadIdx.x % D, stride = p.kv_heads * D;
    const float* const from = sample + ((long long)b * blocks * p.kv_heads + h) * D + d;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = threadIdx.x / D; i < triples; i += THREADS / D)
        sum += middle_of(__ldcg(from + i * stride), __ldcg(from + (i + apart) * stride),
                         __ldcg(from + (i + 2 * apart) * stride));
    room[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < D) {
        for (int i = D; i < THREADS; i += D) sum += room[i + d];
        center[bh * D + d] = sum / triples;
    }
}

// ---- maxima

#if X
#define PAIR "f16x2"
#else
#define PAIR "bf16x2"
#endif

// Pairs of 16-bit floats: their signs, and -Inf.
const u32 SIGNS = 0x80008000;
const u32 LOWEST = X == FP16 ? 0xfc00fc00 : 0xff80ff80;

// The largest of two pairs, of two numbers; NaN where there is one.
__device__ __forceinline__ u32 most(u32 a, u32 b) {
    u32 m;
    asm("max.NaN." PAIR " %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
}
__device__ __forceinline__ float highest(float a, float b) {
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
    return m;
}
// A float as bits that are ordered as floats are, NaN above all. Zero is below all.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0xffffffff;
    return bits >> 31 ? ~bits : bits | 0x80000000;
}
__device__ __forceinline__ float of_ordered(u32 bits) {
    return __uint_as_float(bits >> 31 ? bits ^ 0x80000000 : ~bits);
}

// ---- the steps before the rounding

// The token of the i-th key of `count` that stand for all `keys`: one of each count-th part, not
// the same of each, since images have rows.
__device__ __forceinline__ int sampled(u32 i, u32 count, u32 keys) {
    const u32 begin = u64(i) * keys / count, end = u64(i + 1) * keys / count;
    return begin + ((i * 2654435761u >> 16) * (end - begin) >> 16);
}

__device__ __forceinline__ float inverse_of(float squares, float channels, float eps) {
    return 1.0f / sqrtf(squares / channels + eps);
}

// Sum of the squares of 8 numbers.
__device__ __forceinline__ float squares_of(const float (&v)[WIDTH]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum = fmaf(v[i], v[i], sum);
    return sum;
}

// Four numbers as they lie in memory, in float32.
template <int DTYPE> __device__ __forceinline__ void four(const char* p, float (&f)[4]) {
    if (DTYPE == FP32) {
        const float4 all = *reinterpret_cast<const float4*>(p);
        f[0] = all.x, f[1] = all.y, f[2] = all.z, f[3] = all.w;
    } else {
        const uint2 all = *reinterpret_cast<const uint2*>(p);
        unpack<DTYPE>(all.x, f[0], f[1]);
        unpack<DTYPE>(all.y, f[2], f[3]);
    }
}

const int ANGLE_BYTES = ANGLES == FP32 ? 4 : 2;
// Of a token's cos, or sin.
const int ANGLE_ROW = D / 2 * ANGLE_BYTES;

// What Q and K differ by.
template <bool QUERY> struct Side {
    static const int WEIGHT = QUERY ? Q_WEIGHT : K_WEIGHT;
    static const bool SPLIT = QUERY ? Q_SPLIT : K_SPLIT;
    static const int HEADS = QUERY ? Q_HEADS : K_HEADS;
    const char *x, *weight;
    long long stride_b, stride_h, stride_l;
    int heads, length, tiles;

    __device__ __forceinline__ explicit Side(const Params& p) {
        x = QUERY ? p.q : p.k, weight = QUERY ? p.q_weight : p.k_weight;
        stride_b = QUERY ? p.q_b : p.k_b, stride_h = QUERY ? p.q_h : p.k_h;
        stride_l = QUERY ? p.q_l : p.k_l;
        heads = QUERY ? p.heads : p.kv_heads, length = QUERY ? p.queries : p.keys;
        tiles = count_of(length, TILE);
    }
    __device__ __forceinline__ const char* at(int b, int h, int token, int lane) const {
        return x + 2 * (b * stride_b + h * stride_h + token * stride_l + lane * WIDTH);
    }
    // Of head h: 8 channels of the norm's weight for a token.
    __device__ __forceinline__ void weights(float (&w)[WIDTH], int h, int token, int first,
                                            int lane) const {
        const int span = NORM == TOKEN ? heads * D : D;
        const int from = (NORM == TOKEN ? h * D : 0) + (SPLIT && token >= first ? span : 0);
        Vector<WEIGHT> read;
        read.read(weight, from + lane * WIDTH);
        read.floats(w);
    }
};

// 8 channels of a row times the norm's weight, then turned. Returns what the norm multiplies them
// with, which commutes with both; not that of a token, which is known before.
template <bool QUERY>
__device__ __forceinline__ float prepare(float (&v)[WIDTH], const float (&w)[WIDTH],
                                         const char* cos, const char* sin, float eps) {
    float inverse = 1.0f;
    if (NORM == HEAD) inverse = inverse_of(lanes_sum<1, LANES>(squares_of(v)), D, eps);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
        if (Side<QUERY>::WEIGHT >= 0) v[i] *= w[i];
    if (ANGLES >= 0) {
        float c[4], s[4];
        four<ANGLES>(cos, c), four<ANGLES>(sin, s);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float even = v[2 * i], odd = v[2 * i + 1];
            v[2 * i] = fmaf(even, c[i], -(odd * s[i]));
            v[2 * i + 1] = fmaf(even, s[i], odd * c[i]);
        }
    }
    return inverse;
}
