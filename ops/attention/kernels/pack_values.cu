// The pre-pass of attention for V: see tokens.cu. Codes are transposed: a channel's 16 keys of a chunk
// are 16 bytes. A thread has 16 keys of two channels.

// What is rounded to E4M3's largest, 448.
const float MOST_E4M3 = 464.0f;
// Of a head's `v_state`: it is to be packed again.
const u32 AGAIN = 0x80000000;
// Of a tile as it came.
const int HELD_BYTES = TILE * D * 2;

// The key that stands in a byte of a 16-byte chunk.
__device__ __forceinline__ int key_of(int byte) {
    return SWIZZLED ? byte / 4 * 2 + byte % 4 / 2 * 8 + byte % 2 : byte;
}

// A thread's keys of a tile of a head.
struct Place {
    int bh, pair, chunk;
    const char* v;

    __device__ __forceinline__ Place(const Params& p, int bh)
        : bh(bh), pair(threadIdx.x % (D / 2)), chunk(threadIdx.x / (D / 2)) {
        const int b = bh / p.kv_heads, h = bh % p.kv_heads;
        v = p.v + 2 * (b * p.v_b + h * p.v_h + chunk * 16 * p.v_l + 2 * pair);
    }
    // How many of the 16 there are.
    __device__ __forceinline__ int keys(const Params& p, int tile) const {
        return p.keys - tile * TILE - chunk * 16;
    }
    __device__ __forceinline__ void fetch(const Params& p, int tile, u32 (&x)[16]) const {
        const char* const from = v + 2 * (tile * TILE * p.v_l);
#pragma unroll
        for (int key = 0; key < 16; ++key)
            if (key < keys(p, tile))
                asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];"
                             : "=r"(x[key]) : "l"(from + key * 2 * p.v_l));
    }
    // The same of a tile that is held.
    __device__ __forceinline__ void take(const char* held, u32 (&x)[16]) const {
#pragma unroll
        for (int key = 0; key < 16; ++key)
            x[key] = *reinterpret_cast<const u32*>(held + (chunk * 16 + key) * (2 * D) + 4 * pair);
    }
};

// The maxima of two channels, and of what is their negative, so far.
struct Ends {
    u32 high, low;

    __device__ __forceinline__ void see(const u32 (&x)[16], int keys) {
#pragma unroll
        for (int key = 0; key < 16; ++key)
            if (key < keys) high = most(high, x[key]), low = most(low, x[key] ^ SIGNS);
    }
    // Those of all threads of a block, by way of `all`.
    __device__ __forceinline__ void gather(const Params& p, const Place& place, u32* all) const {
        all[place.chunk * D + place.pair] = high;
        all[place.chunk * D + D / 2 + place.pair] = low;
        __syncthreads();
        if (threadIdx.x < D) {
            u32 ends = all[threadIdx.x];
#pragma unroll
            for (int n = 1; n < 8; ++n) ends = most(ends, all[n * D + threadIdx.x]);
            float even, odd;
            unpack<X>(ends, even, odd);
            u32* const to = p.v_ends + (place.bh * 2 + threadIdx.x / (D / 2)) * D + 2 * place.pair;
            atomicMax(to, ordered(even));
            atomicMax(to + 1, ordered(odd));
        }
        __syncthreads();
    }
};

// Of some tiles of a head: the range.
__device__ __forceinline__ void see(const Params& p, int bh, int tile, int end) {
    const Place place(p, bh);
    Ends ends = {LOWEST, LOWEST};
    u32 x[16], next[16];
    place.fetch(p, tile, next);
    for (; tile < end; ++tile) {
#pragma unroll
        for (int key = 0; key < 16; ++key) x[key] = next[key];
        if (tile + 1 < end) place.fetch(p, tile + 1, next);
        ends.see(x, place.keys(p, tile));
    }
    ends.gather(p, place, reinterpret_cast<u32*>(shared));
}

#if V == 1
// Four numbers as the bytes of a word.
__device__ __forceinline__ u32 word_of(const float (&c)[4]) {
    return pack_e4m3(c[0], c[1]) | pack_e4m3(c[2], c[3]) << 16;
}
// Sums of four channels' 128 codes, of which 8 neighbouring lanes have 16 each: lanes 0 to 3 of a warp
// get one each. By a product with ones, whose column n comes from four lanes from 4n on.
__device__ __forceinline__ float sum_of(const uint4& codes) {
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
    const u32 ones[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 low, high;
        asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\n"
            "cvt.rn.f16x2.e4m3x2 %1, h;\n}\n" : "=r"(low), "=r"(high) : "r"(words[i]));
        mma<FP16>(sums, ones, low, high);
    }
    return sums[0] + sums[1];
}
#else
__device__ __forceinline__ u32 word_of(const float (&c)[4]) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(c[i] + ROUND);
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x40), __byte_perm(bits[2], bits[3], 0x40),
                       0x5410);
}
// The same of integers.
__device__ __forceinline__ float sum_of(const uint4& codes) {
    const int ones = 0x01010101;
    int sum = __dp4a(int(codes.x), ones, __dp4a(int(codes.y), ones, 0));
    sum = lanes_sum<1, 8>(__dp4a(int(codes.z), ones, __dp4a(int(codes.w), ones, sum)));
    return __shfl_sync(FULL_WARP, sum, threadIdx.x % 4 * 8);
}
#endif

// Two channels of 16 keys, of which `keys` count, as two chunks. left: the sums of what was rounded.
// Returns the largest magnitude that was to be rounded.
template <bool WHOLE>
__device__ __forceinline__ float chunks_of(const u32 (&x)[16], const float2 mean,
                                           const float2 inverse, int keys, uint4 (&chunks)[2],
                                           float2& left) {
    u32 words[2][4];
    float largest = 0.0f, other = 0.0f;
    left = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        float c[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = key_of(4 * word + i);
            unpack<X>(x[key], c[0][i], c[1][i]);
            c[0][i] -= mean.x, c[1][i] -= mean.y;
            if (!WHOLE && key >= keys) c[0][i] = c[1][i] = 0.0f;
            c[0][i] *= inverse.x, c[1][i] *= inverse.y;
            left.x += c[0][i], left.y += c[1][i];
            if (V == E4M3) largest = larger(largest, c[0][i]), other = larger(other, c[1][i]);
        }
#pragma unroll
        for (int side = 0; side < 2; ++side) words[side][word] = word_of(c[side]);
    }
#pragma unroll
    for (int side = 0; side < 2; ++side)
        chunks[side] = make_uint4(words[side][0], words[side][1], words[side][2], words[side][3]);
    return larger(largest, other);
}

// The scales of two channels: of what was seen of them the largest distance from the mean over the
// limit. The mean is between the ends, but for its last bits, so that both distances are positive.
__device__ __forceinline__ float2 scales_of(const Params& p, const Place& place,
                                            float2 mean) {
    const uint2* const ends = reinterpret_cast<const uint2*>(p.v_ends + place.bh * 2 * D);
    const uint2 high = __ldcg(ends + place.pair), low = __ldcg(ends + D / 2 + place.pair);
    const float x = larger(of_ordered(high.x) - mean.x, of_ordered(low.x) + mean.x) / p.limit;
    const float y = larger(of_ordered(high.y) - mean.y, of_ordered(low.y) + mean.y) / p.limit;
    // Not fmaxf, which would drop a NaN.
    return make_float2(x < TINY ? TINY : x, y < TINY ? TINY : y);
}

// Some tiles of a head, transposed; the first tile's also writes the scales. HELD: they are in shared
// memory, each of which is where its codes are staged.
template <bool HELD>
__device__ __forceinline__ void pack(const Params& p, int bh, int tile, int end) {
    char* room = shared;
    const Place place(p, bh);
    const int tiles = count_of(p.keys, TILE), pair = place.pair, chunk = place.chunk;
    u32 x[16];
    if (!HELD) place.fetch(p, tile, x);
    const float2 mean = __ldcg(reinterpret_cast<const float2*>(p.v_mean + bh * D) + pair);
    const float2 scale = scales_of(p, place, mean);
    const float2 inverse = make_float2(1.0f / scale.x, 1.0f / scale.y);
    if (tile == 0 && chunk == 0) reinterpret_cast<float2*>(p.v_scale + bh * D)[pair] = scale;
    bool beyond = false;
    for (; tile < end; ++tile) {
        uint4* const staged = reinterpret_cast<uint4*>(room);
        float* const part_left = reinterpret_cast<float*>(staged + D * 8);
        const int keys = place.keys(p, tile);
        if (HELD) place.take(room, x);
        uint4 chunks[2];
        float2 left;
        const float largest = keys >= 16 ? chunks_of<true>(x, mean, inverse, 16, chunks, left)
                                         : chunks_of<false>(x, mean, inverse, keys, chunks, left);
        beyond |= V == E4M3 && !(largest <= MOST_E4M3);
        if (HELD) {
            __syncthreads();
            room += HELD_BYTES;
        } else if (tile + 1 < end) {
            place.fetch(p, tile + 1, x);
        }
        // Neighbouring lanes begin with the one or the other channel: no two of 8 in the same banks.
        const int begin = threadIdx.x >> 2 & 1;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int side = i ^ begin, channel = 2 * pair + side;
            staged[channel * 8 + (chunk ^ channel % 8)] = side ? chunks[1] : chunks[0];
        }
        reinterpret_cast<float2*>(part_left + chunk * LEFT_ROW)[pair] = left;
        __syncthreads();
        const long long number = (long long)bh * tiles + tile;
        uint4* const to = reinterpret_cast<uint4*>(p.v_codes) + number * D * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 at = i * THREADS + threadIdx.x;
            const uint4 codes = staged[SWIZZLED ? at : at ^ at / 8 % 8];
            to[at] = codes;
            // Of four channels.
            const float sum = sum_of(codes);
            const u32 lane = threadIdx.x % 32, channel = (at & ~31u) / 8 + lane % 4;
            const float all = lanes_sum<4, 32>(part_left[lane / 4 * LEFT_ROW + channel]);
            if (lane < 4) {
                p.v_left[number * D + channel] = all - sum;
                // Hopper's kernel does not read it.
                if (!SWIZZLED) p.v_sum[number * D + channel] = sum;
            }
        }
        __syncthreads();
    }
    if (beyond) p.v_state[bh] = AGAIN;
}

// ---- kernels, one after the other; a block of `pack_values` and `see_values` has VALUE_TILES tiles

#if V == 2
// Whether all blocks of a head have told their range, once they have. false where that takes too long, or
// took for another head.
__device__ __forceinline__ bool range_is_known(u32* head, u32 blocks, u32* gave_up) {
    const long long begin = clock64();
    while (true) {
        const u32 seen = told(head);
        if (seen & AGAIN) return false;
        if (seen == blocks) return true;
        if (clock64() - begin >= PATIENCE || told(gave_up)) break;
        __nanosleep(64);
    }
    atomicOr(head, AGAIN);
    atomicExch(gave_up, 1);
    return false;
}

// Integers use all of their range: a block holds v_held tiles of a head until it is known. All blocks of
// a head run at once, unless others have the GPU: none waits for ever, and the head is packed at the end
// where one did not.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
hold_values(const __grid_constant__ Params p) {
    __shared__ bool known;
    const int tiles = count_of(p.keys, TILE), blocks = count_of(tiles, p.v_held);
    const int bh = blockIdx.x / blocks, begin = blockIdx.x % blocks * p.v_held;
    const int end = min(tiles, begin + p.v_held);
    const char* const v = p.v + 2 * ((long long)(bh / p.kv_heads) * p.v_b
                                     + (bh % p.kv_heads) * p.v_h + begin * TILE * p.v_l);
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    for (int first = 0; first < (end - begin) * TILE; first += TILE) {
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const int key = first + j * ROWS + row;
            if (begin * TILE + key < p.keys)
                copy_async(shared + (key * LANES + lane) * 16, v + 2 * (key * p.v_l + lane * WIDTH));
        }
        end_group();
    }
    const Place place(p, bh);
    Ends ends = {LOWEST, LOWEST};
    for (int tile = begin; tile < end; ++tile) {
        await_groups(end - 1 - tile);
        __syncthreads();
        u32 x[16];
        place.take(shared + (tile - begin) * HELD_BYTES, x);
        ends.see(x, place.keys(p, tile));
    }
    ends.gather(p, place, reinterpret_cast<u32*>(shared + p.v_held * HELD_BYTES));
    tell(p.v_state + bh);
    if (threadIdx.x == 0) known = range_is_known(p.v_state + bh, blocks, Counters(p).gave_up);
    __syncthreads();
    if (known) pack<true>(p, bh, begin, end);
}

// The same in two kernels, which read V twice, where a head has more keys than the GPU can hold.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
see_values(const __grid_constant__ Params p) {
    const int tiles = count_of(p.keys, TILE), parts = count_of(tiles, VALUE_TILES);
    const int begin = blockIdx.x % parts * VALUE_TILES;
    see(p, blockIdx.x / parts, begin, min(tiles, begin + VALUE_TILES));
}
#endif

// E4M3's scale has room for values beyond those of the sample, and is the less exact only for what is
// smaller than a 28,000th of the largest that there is room for.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
pack_values(const __grid_constant__ Params p) {
    const int tiles = count_of(p.keys, TILE), parts = count_of(tiles, VALUE_TILES);
    const int begin = blockIdx.x % parts * VALUE_TILES;
    pack<false>(p, blockIdx.x / parts, begin, min(tiles, begin + VALUE_TILES));
}

// A block for each head: packs it again where values were beyond that room, or not all blocks of
// `hold_values` ran at once, which takes long and is seldom done; and what gives its channels their mean.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
finish_values(const __grid_constant__ Params p) {
    const int bh = blockIdx.x, tiles = count_of(p.keys, TILE), at = bh * D + threadIdx.x;
    const long long first = (long long)bh * tiles * D;
    if (p.v_state[bh] & AGAIN) {
        // What `hold_values` told is of all keys.
        if (V == E4M3) see(p, bh, 0, tiles);
        pack<false>(p, bh, 0, tiles);
        __syncthreads();
    }
    float* const room = reinterpret_cast<float*>(shared);
    float* const left = room + THREADS;
    add_up(left, p.v_left + first, tiles, D, room);
    if (threadIdx.x < D) {
        const float steps = left[threadIdx.x] / p.keys;
        p.v_offset[at] = fmaf(__ldcg(p.v_scale + at), steps, __ldcg(p.v_mean + at));
    }
}
