// quantize_rows: a team of warps has a row, reads it once and keeps it in registers. Threads
// exchange nothing but sums and the largest magnitude.
//
// Compiled with these set: X (dtype), FP8, GROUPS of 256 columns in a row, WARPS of a team, BLOCKS
// (groups of each warp, at most), TEAMS of a block, RESIDENT (blocks on a multiprocessor, at
// least), ROTATE, PARTS (of rotate.cu), NORM, GELU, STATIC, WEIGHT, BIAS, SCALE, SHIFT (dtype,
// ABSENT or not), SHARED: a block stays for many rows, which have the same modulation, in shared
// memory, where the next rows come too, and INTERLEAVE: FP8 is stored in the order of order.py, for
// a product that may be set up meanwhile.

enum Norm { NO_NORM = 0, LAYER = 1, RMS = 2 };

const int GROUP = 256;
const int K = GROUPS * GROUP;
// Columns between a warp's groups: they go to the warps in turn.
const int APART = WARPS * GROUP;
const int THREADS = TEAMS * WARPS * 32;
// The power of two that WARPS is, or is below.
const int LANES = WARPS <= 2 ? WARPS : WARPS <= 4 ? 4 : WARPS <= 8 ? 8 : WARPS <= 16 ? 16 : 32;
const bool PREPARE = NORM || GELU || WEIGHT >= 0 || BIAS >= 0 || SCALE >= 0 || SHIFT >= 0;
// A small float32 plus 1.5 · 2^23 is the nearest even integer, in the low bits of its mantissa.
const float ROUND = 12582912.0f;
// The smallest normal float32: the scale of a token of zeros.
const float TINY = 1.1754943508222875e-38f;
// GELU is left twice as large, where that cannot overflow: one multiplication less.
const bool DOUBLED = GELU && !(ROTATE && X == FP16);
// Of the values that are rounded to codes: a power of two.
const float UNIT = (ROTATE ? 0.0625f : 1.0f) * (DOUBLED ? 0.5f : 1.0f);
// GELU is x/2 · (1 + tanh(x · (LINEAR + CUBIC · x²))): √(2/π), and 0.044715 of it.
const float LINEAR = 0.7978845608028654f;
const float CUBIC = 0.035677408136300125f;
// Σx² - (Σx)²/K is taken as the variance up to this square of the mean in variances: it costs four
// of the 24 bits. Beyond, deviations are summed.
const float FAR = 16.0f;

struct Params {
    const void* x;
    void* stored;
    float* row_scale;
    const float* input_scale;
    const void* weight;
    const void* bias;
    const void* scale;
    const void* shift;
    long long stride_x, stride_scale, stride_shift;
    u32 magic_scale, magic_shift, bits_scale, bits_shift;
    u32 tokens, parts;
    float eps, limit;
    u32 zeros[3];
};

// ---- sums of the row

// What the warps of a team tell each other, for two rows in turn: nobody waits for those who read.
struct Exchange {
    float2 sums[2][2][WARPS];
    u32 largest[2][WARPS];
};

// The threads that work on one row.
struct Team {
    Exchange* exchange;
    int lane, warp, index, turn;

    __device__ __forceinline__ explicit Team(Exchange* exchanges) {
        lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        index = warp / WARPS, warp %= WARPS, turn = 0;
        exchange = exchanges + index;
    }
    __device__ __forceinline__ void wait() const {
        if (TEAMS == 1)
            __syncthreads();
        else
            asm volatile("bar.sync %0, %1;" ::"r"(index + 1), "n"(WARPS * 32) : "memory");
    }
    // a, b: the sums over the lanes of a warp, in all of them, to those over the team.
    __device__ __forceinline__ void sum(float& a, float& b, int which) const {
        if (WARPS == 1) return;
        float2* const sums = exchange->sums[turn][which];
        if (lane == 0) sums[warp] = make_float2(a, b);
        wait();
        const int i = lane & (LANES - 1);
        const float2 part = i < WARPS ? sums[i] : make_float2(0.0f, 0.0f);
        a = lanes_sum<1, LANES>(part.x);
        b = lanes_sum<1, LANES>(part.y);
    }
    // The largest magnitude, NaN where there is one: they are in the order of their bits.
    __device__ __forceinline__ float max(float largest) const {
        u32 bits = warp_max(__float_as_uint(largest));
        if (WARPS > 1) {
            u32* const all = exchange->largest[turn];
            if (lane == 0) all[warp] = bits;
            wait();
            bits = warp_max(lane < WARPS ? all[lane] : 0);
        }
        return __uint_as_float(bits);
    }
    // Whether the row has this warp's group j.
    __device__ __forceinline__ bool has(int j) const {
        return (j + 1) * WARPS <= GROUPS || j * WARPS + warp < GROUPS;
    }
};

__device__ __forceinline__ void warp_sum(float& a, float& b) {
    a = lanes_sum<1, 32>(a);
    b = lanes_sum<1, 32>(b);
}

// Sum of x and of x² over the row, by products: ones with X, and, of any two words of 8 lanes'
// pairs, all with each, whose diagonal is what is wanted.
__device__ __forceinline__ void moments(const Vector<X> (&x)[BLOCKS], float& sum, float& squares) {
    const u32 one = X == FP16 ? 0x3c003c00 : 0x3f803f80, ones[4] = {one, one, one, one};
    float s[4] = {}, upper[4] = {}, lower[4] = {};
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
        const uint4 p = x[j].part[0];
        if (NORM == LAYER) mma<X>(s, ones, p.x, p.y);
        mma_half<X>(upper, p.x, p.y, p.x);
        mma_half<X>(lower, p.x, p.y, p.y);
        if (NORM == LAYER) mma<X>(s, ones, p.z, p.w);
        mma_half<X>(upper, p.z, p.w, p.z);
        mma_half<X>(lower, p.z, p.w, p.w);
    }
    const int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
    const float even = upper[0] + lower[2], odd = upper[1] + lower[3];
    squares = lanes_sum<1, 32>(g >> 1 == t ? (g & 1 ? odd : even) : 0.0f);
    sum = lanes_sum<1, 4>(s[0] + s[1]);
}

// Sum over the row of x - mean and of its square, in float32.
__device__ __forceinline__ void add(const Vector<X>& x, float mean, float& sum, float& squares) {
    float v[WIDTH];
    x.floats(v);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float away = v[i] - mean;
        sum += away;
        squares = fmaf(away, away, squares);
    }
}

// The factor and the term of the norm: x · factor + term. x: of this lane; at: where it lies.
__device__ __forceinline__ void norm(const Team& team, const Vector<X> (&x)[BLOCKS], const char* at,
                                     float eps, float& factor, float& term) {
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
    if (X == FP32) {
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j)
            if (team.has(j)) add(x[j], 0.0f, sum, squares);
        warp_sum(sum, squares);
    } else {
        moments(x, sum, squares);
    }
    team.sum(sum, squares, 0);
    float variance = squares * (1.0f / K);
    if (NORM == LAYER) {
        mean = sum * (1.0f / K);
        variance -= mean * mean;
        // The same in all threads; a NaN goes this way too. Read again: no registers for what is
        // seldom done.
        if (!(mean * mean <= FAR * variance)) {
            sum = squares = 0.0f;
#pragma unroll 1
            for (int j = 0; j < BLOCKS; ++j) {
                if (!team.has(j)) continue;
                Vector<X> again;
                again.read(at, j * APART);
                add(again, mean, sum, squares);
            }
            warp_sum(sum, squares);
            team.sum(sum, squares, 1);
            variance = squares * (1.0f / K);
        }
    }
    factor = rsqrtf(variance + eps);
    term = -mean * factor;
}

// ---- columns

// GELU, doubled where DOUBLED.
__device__ __forceinline__ float gelu(float x) {
    const float tanh = tanh_approximate(x * fmaf(x * x, CUBIC, LINEAR));
    const float some = DOUBLED ? x : 0.5f * x;
    return fmaf(some, tanh, some);
}

// Where columns begin in a tensor [rows, K] of which row i // tokens is the token's, as magic and
// bits divide: ⌊2 i · magic / 2^32⌋ / 2^bits.
__device__ __forceinline__ const char* columns(const void* base, int dtype, int column, u32 i = 0,
                                               long long stride = 0, u32 magic = 0, u32 bits = 0) {
    const long long row = __umulhi(2 * i, magic) >> bits;
    return static_cast<const char*>(base) + (row * stride + column) * (dtype == FP32 ? 4 : 2);
}

// What a token is multiplied with and what is added to it, from some column on.
struct Source {
    const char *weight, *bias, *scale, *shift;

    __device__ __forceinline__ Source(const Params& p, u32 row, int column) {
        weight = columns(p.weight, WEIGHT, column);
        bias = columns(p.bias, BIAS, column);
        scale = columns(p.scale, SCALE, column, row, p.stride_scale, p.magic_scale, p.bits_scale);
        shift = columns(p.shift, SHIFT, column, row, p.stride_shift, p.magic_shift, p.bits_shift);
    }
};

struct Modulation {
    Vector<WEIGHT> weight;
    Vector<BIAS> bias;
    Vector<SCALE> scale;
    Vector<SHIFT> shift;

    __device__ __forceinline__ void read(const Source& from, int column) {
        weight.read(from.weight, column), bias.read(from.bias, column);
        scale.read(from.scale, column), shift.read(from.shift, column);
    }
    // v after weight, bias and modulation.
    __device__ __forceinline__ void apply(float (&v)[WIDTH]) const {
        float w[WIDTH], b[WIDTH], s[WIDTH], a[WIDTH];
        weight.floats(w), bias.floats(b), scale.floats(s), shift.floats(a);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            if (WEIGHT >= 0) v[i] *= w[i];
            if (BIAS >= 0) v[i] += b[i];
            if (SCALE >= 0) v[i] = fmaf(v[i], s[i], v[i]);
            if (SHIFT >= 0) v[i] += a[i];
        }
    }
    // The same as one factor and one term.
    __device__ __forceinline__ void join(float (&factor)[WIDTH], float (&term)[WIDTH]) const {
        float w[WIDTH], b[WIDTH], s[WIDTH], a[WIDTH];
        weight.floats(w), bias.floats(b), scale.floats(s), shift.floats(a);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            const float m = SCALE >= 0 ? 1.0f + s[i] : 1.0f;
            factor[i] = WEIGHT >= 0 ? w[i] * m : m;
            term[i] = (BIAS >= 0 ? b[i] * m : 0.0f) + (SHIFT >= 0 ? a[i] : 0.0f);
        }
    }
};

// Factors and terms of all columns in shared memory, 8 columns as four times 16 bytes that are
// CHUNKS apart: neighbouring threads read neighbouring 16 bytes.
const int CHUNKS = K / WIDTH;

__device__ __forceinline__ void fill(float4* joined, const Params& p, u32 row) {
    const Source source(p, row, 0);
    for (int i = threadIdx.x; i < CHUNKS; i += THREADS) {
        Modulation modulation;
        float f[WIDTH], t[WIDTH];
        modulation.read(source, i * WIDTH);
        modulation.join(f, t);
        joined[i] = make_float4(f[0], f[1], f[2], f[3]);
        joined[i + CHUNKS] = make_float4(f[4], f[5], f[6], f[7]);
        joined[i + 2 * CHUNKS] = make_float4(t[0], t[1], t[2], t[3]);
        joined[i + 3 * CHUNKS] = make_float4(t[4], t[5], t[6], t[7]);
    }
}
__device__ __forceinline__ void apply(const float4* joined, float (&v)[WIDTH]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float4 f = joined[h * CHUNKS], t = joined[(h + 2) * CHUNKS];
        v[4 * h] = fmaf(v[4 * h], f.x, t.x);
        v[4 * h + 1] = fmaf(v[4 * h + 1], f.y, t.y);
        v[4 * h + 2] = fmaf(v[4 * h + 2], f.z, t.z);
        v[4 * h + 3] = fmaf(v[4 * h + 3], f.w, t.w);
    }
}

// 4 bytes of 8, from the lowest.
__device__ __forceinline__ u32 codes(const float* v, float inverse) {
    float c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // The sums of a rotation have no last bits to agree on: one rounding fewer.
        if (ROTATE && !FP8) {
            c[i] = fmaf(v[i], inverse, ROUND);
            continue;
        }
        c[i] = v[i] * inverse;
        if (!FP8) c[i] += ROUND;
        // Cut off at the limit, Inf would pass for a number: Inf · 0 is NaN.
        if (STATIC) c[i] = fmaf(c[i], 0.0f, c[i]);
    }
    if (FP8) return pack_e4m3(c[0], c[1]) | pack_e4m3(c[2], c[3]) << 16;
    const u32 low = __byte_perm(__float_as_uint(c[0]), __float_as_uint(c[1]), 0x0040);
    const u32 high = __byte_perm(__float_as_uint(c[2]), __float_as_uint(c[3]), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

// Where the first of 8 columns in a row is stored. Interleaved, column 32 t + 8 j + 4 h + b goes to
// 32 j + 16 h + 4 t + (b ^ 1), of each 128.
__device__ __forceinline__ int place_of(int column) {
    if (!INTERLEAVE) return column;
    return (column & ~127) + (column >> 3 & 3) * 32 + (column >> 5 & 3) * 4;
}
__device__ __forceinline__ void store(char* to, const float (&v)[WIDTH], float inverse) {
    if (!INTERLEAVE) {
        *reinterpret_cast<uint2*>(to) = make_uint2(codes(v, inverse), codes(v + 4, inverse));
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float four[4] = {v[4 * h + 1], v[4 * h], v[4 * h + 3], v[4 * h + 2]};
        *reinterpret_cast<u32*>(to + 16 * h) = codes(four, inverse);
    }
}

// The scale of a row whose values' largest magnitude in this thread is `largest`, in UNITs.
__device__ __forceinline__ float scale_of(const Team& team, float largest, const Params& p,
                                          u32 row) {
    if (STATIC) return *p.input_scale;
    // Division rounded as IEEE has it: the same codes and scales on every device.
    const float step = team.max(largest) * UNIT / p.limit;
    // Not fmaxf, which would drop a NaN.
    const float scale = step < TINY ? TINY : step;
    if (team.warp == 0 && team.lane == 0) p.row_scale[row] = scale;
    return scale;
}

const int X_BYTES = X == FP32 ? 4 : 2;
// 16 bytes of them that a thread reads of each group.
const int PIECES = X == FP32 ? 2 : 1;

__device__ __forceinline__ void read(Vector<X> (&x)[BLOCKS], const Team& team, const char* from) {
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
        if (team.has(j)) x[j].read(from, j * APART, true);
}

// SHARED: a team's next row comes to shared memory while it works on one. A warp copies what it
// reads, so that nobody waits for others. Lanes copy in the order of columns, in whatever order they
// read: to copy 16 bytes elsewhere in a line takes several times as long.
__device__ __forceinline__ void fetch(uint4* ahead, const Team& team, const char* from) {
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
        for (int h = 0; h < PIECES; ++h)
            if (team.has(j))
                copy_async(ahead + (j * PIECES + h) * THREADS, from + j * APART * X_BYTES + 16 * h);
}
__device__ __forceinline__ void take(Vector<X> (&x)[BLOCKS], const Team& team, const uint4* came) {
    await_copies();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j)
#pragma unroll
        for (int h = 0; h < PIECES; ++h)
            if (team.has(j)) x[j].part[h] = came[(j * PIECES + h) * THREADS];
    // Read before the next row's come to the same place.
    __syncwarp();
}

extern __shared__ float4 joined[];

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
quantize_rows(const __grid_constant__ Params p) {
    __shared__ Exchange exchanges[TEAMS];
    if (INTERLEAVE) let_next_kernel_start();
    Team team(exchanges);
    // Lane bits 0 to 4 are k1 k2 n0 n1 n2, bits 1 2 0 3 4 of the 8 columns' place in a group.
    const int lane = team.lane;
    const int place = ROTATE ? (lane & 24) | (lane & 3) << 1 | (lane >> 2 & 1) : lane;
    const int column = team.warp * GROUP + place * WIDTH;
    // SHARED: `tokens` rows with the same modulation are for `parts` blocks, one after another.
    const u32 part = SHARED ? blockIdx.x % p.parts : blockIdx.x;
    const u32 first = SHARED ? blockIdx.x / p.parts * p.tokens : 0;
    const u32 end = SHARED ? first + p.tokens : gridDim.x;
    const u32 stride = p.parts * TEAMS;
    u32 row = first + part * TEAMS + team.index;
    const char* const x = columns(p.x, X, column);
    const float4* const mine = joined + column / WIDTH;
    // Of this thread: where it copies from and to, and where it reads what came.
    const char* const copied = columns(p.x, X, team.warp * GROUP + lane * WIDTH);
    uint4* const ahead = reinterpret_cast<uint4*>(joined + 4 * CHUNKS) + threadIdx.x;
    const uint4* const came = ahead + (place - lane);

    Vector<X> given[BLOCKS] = {};
    if (SHARED) {
        if (row < end) fetch(ahead, team, copied + row * p.stride_x * X_BYTES);
        fill(joined, p, first);
        __syncthreads();
    }
    const Hadamard hadamard(lane, p.zeros);
    for (; row < end; row += stride) {
        const char* const from = x + row * p.stride_x * X_BYTES;
        if (SHARED)
            take(given, team, came);
        else
            read(given, team, from);
        if (SHARED && row + stride < end)
            fetch(ahead, team, copied + (row + stride) * p.stride_x * X_BYTES);
        Modulation modulations[BLOCKS];
        const Source source(p, row, column);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j)
            if (!SHARED && team.has(j)) modulations[j].read(source, j * APART);

        float factor = 1.0f, term = 0.0f, largest = 0.0f, other = 0.0f, v[BLOCKS][WIDTH];
        if (NORM) norm(team, given, from, p.eps, factor, term);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j) {
            if (!team.has(j)) continue;
            if (PREPARE || !ROTATE) given[j].floats(v[j]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                if (NORM) v[j][i] = fmaf(v[j][i], factor, term);
            if (SHARED)
                apply(mine + j * (APART / WIDTH), v[j]);
            else
                modulations[j].apply(v[j]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                if (GELU) v[j][i] = gelu(v[j][i]);
            // From the dtype of x, as it would be read after a step of its own.
            if (PREPARE && ROTATE) given[j].round(v[j]);
            if (ROTATE) hadamard.rotate(given[j], v[j]);
#pragma unroll
            for (int i = 0; i < WIDTH; i += 2) {
                largest = larger(largest, v[j][i]);
                other = larger(other, v[j][i + 1]);
            }
        }
        const float inverse = 1.0f / scale_of(team, larger(largest, other), p, row) * UNIT;
        char* const stored = static_cast<char*>(p.stored) + u64(row) * K + place_of(column);
#pragma unroll
        for (int j = 0; j < BLOCKS; ++j)
            if (team.has(j)) store(stored + j * APART, v[j], inverse);
        if (!SHARED) return;
        team.turn ^= 1;
    }
}
