// The pre-pass of attention for Q and K: see tokens.cu.

// Of a tile: its angles, then its rows.
const int ANGLE_TILES = ANGLES < 0 ? 0 : 2 * TILE * ANGLE_ROW;

// ---- what blocks tell each other
//
// Blocks take their items in order (`ticket`), and an item waits for earlier ones alone. Of all that
// are not done the first one's block works on it, and so none waits for ever.

// `tell`; returns whether all `wanted` have told now, and what they wrote is to be seen.
__device__ __forceinline__ bool tell_last(u32* counter, u32 wanted) {
    __shared__ u32 before;
    __syncthreads();
    if (threadIdx.x == 0)
        asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                     : "=r"(before) : "l"(counter) : "memory");
    __syncthreads();
    return before + 1 == wanted;
}
// Units (tiles, or heads) with some items that come `lag` units ahead of the others.
struct Stream {
    u32 ahead, after, units, lag;

    __device__ __forceinline__ u32 size() const { return (units + lag) * (ahead + after); }
    // The unit of an item and its number in it, of those ahead or after; false for none.
    __device__ __forceinline__ bool find(u32 item, bool& early, int& unit, int& part) const {
        const u32 each = ahead + after, slot = item / each, n = item % each;
        early = n < ahead;
        unit = early ? slot : slot - lag;
        part = early ? n : n - ahead;
        return early ? slot < units : slot >= lag;
    }
};

// Calls work(item) for the items of this block, of so many in all.
template <typename Work>
__device__ __forceinline__ void take_turns(u32* ticket, u32 items, Work work) {
    __shared__ u32 taken[2];
    if (threadIdx.x == 0) taken[0] = atomicAdd(ticket, 1);
    __syncthreads();
    for (u32 turn = 0, item = taken[0]; item < items; item = taken[turn]) {
        turn ^= 1;
        // The next one, meanwhile.
        if (threadIdx.x == 0) taken[turn] = atomicAdd(ticket, 1);
        work(item);
        __syncthreads();
    }
}

// ---- what comes of the sample

// How often as far from the mean a value may be as the largest of the sample; but if that is far away
// from all others, as the largest of a few tokens is on the mean: else these had no range left.
const float ROOM = 16.0f, USUAL_ROOM = 128.0f;
// Of any room: a scale stays finite where the values are.
const float MOST_ROOM = 1e37f;

__device__ __forceinline__ void mean_key(const Params& p, int bh) {
    center_of_sample(p, p.sample, p.k_mean, bh);
    tell(Counters(p).means);
}

__device__ __forceinline__ void sample_values(const Params& p, int bh) {
    const float* const mean = mean_of_sample(p, p.v_sample, p.v_mean, bh);
    if (V != E4M3) return;
    const int blocks = count_of(min(p.keys, SAMPLE), SURVEY_TOKENS), end = threadIdx.x / D;
    const int b = bh / p.kv_heads, h = bh % p.kv_heads, d = threadIdx.x % D;
    if (end >= 2) return;
    const long long first = ((long long)b * blocks * 2 + end) * p.kv_heads + h;
    const float* const from = p.v_sample_ends + first * D + d;
    float largest = __ldcg(from), sum = largest;
    // NaN stays, Inf too.
#pragma unroll 8
    for (int i = 1; i < blocks; ++i) {
        const float other = __ldcg(from + (long long)i * 2 * p.kv_heads * D);
        largest = highest(largest, other), sum += other;
    }
    const float middle = end ? -mean[d] : mean[d];
    const float room = fminf(ROOM * (largest - middle), USUAL_ROOM * (sum / blocks - middle));
    p.v_ends[(bh * 2 + end) * D + d] = ordered(highest(largest, middle + fminf(room, MOST_ROOM)));
}

// ---- Q and K

// Of keys: 1 / sqrt(mean(x²) + eps) over the channels of all heads, a token for each warp. Codes of
// queries do not depend on it: theirs comes after packing.
__device__ __forceinline__ void inverse_rms(const Params& p, int unit, int part) {
    const Side<false> side(p);
    const int b = unit / side.tiles, lane = threadIdx.x % 32;
    const int token = unit % side.tiles * TILE + part * WARPS + threadIdx.x / 32;
    // Heads that a warp reads at once.
    const int at_once = 32 / LANES;
    const char* x = side.at(b, lane / LANES, min(token, side.length - 1), lane % LANES);
    // Squares by products, of any two words of 8 lanes' pairs, all with each: what is wanted is on
    // the diagonal.
    float upper[4] = {}, lower[4] = {};
#pragma unroll 10
    for (int h = 0; h < side.heads; h += at_once) {
        uint4 words = make_uint4(0, 0, 0, 0);
        if (h + lane / LANES < side.heads) words = load(x);
        mma_half<X>(upper, words.x, words.y, words.x);
        mma_half<X>(lower, words.x, words.y, words.y);
        mma_half<X>(upper, words.z, words.w, words.z);
        mma_half<X>(lower, words.z, words.w, words.w);
        x += 2 * at_once * side.stride_h;
    }
    const int g = lane >> 2, t = lane & 3;
    const float even = upper[0] + lower[2], odd = upper[1] + lower[3];
    const float sum = lanes_sum<1, 32>(g >> 1 == t ? (g & 1 ? odd : even) : 0.0f);
    if (lane == 0 && token < side.length)
        p.k_inverse[(long long)b * side.length + token] = inverse_of(sum, side.heads * D, p.eps);
    tell(Counters(p).k + unit);
}

// Times the orthonormal Hadamard matrix, channels over the lanes of a row.
__device__ __forceinline__ void rotate(float (&v)[WIDTH], int lane) {
#pragma unroll
    for (int bit = 1; bit < WIDTH; bit <<= 1)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            if (!(i & bit)) {
                const float low = v[i], high = v[i | bit];
                v[i] = low + high, v[i | bit] = low - high;
            }
    const float unit = D == 64 ? 0.125f : 0.08838834764831845f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
        for (int bit = 1; bit < LANES; bit <<= 1) {
            const float other = __shfl_xor_sync(FULL_WARP, v[i], bit);
            v[i] = lane & bit ? other - v[i] : v[i] + other;
        }
        v[i] *= unit;
    }
}

// The bits of the largest magnitude, ordered as these are; NaN has the largest of all.
__device__ __forceinline__ u32 largest_of(const float (&v)[WIDTH]) {
    float a = 0.0f, b = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 2) a = larger(a, v[i]), b = larger(b, v[i + 1]);
    return __float_as_uint(larger(a, b));
}
__device__ __forceinline__ float step_of(u32 largest) {
    const float step = __uint_as_float(largest) * (1.0f / 127.0f);
    // Not fmaxf, which would drop a NaN.
    return step < TINY ? TINY : step;
}
// To the last bits.
__device__ __forceinline__ float over_of(float step) {
    float over;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(over) : "f"(step));
    return over;
}
__device__ __forceinline__ float root(float x) {
    float r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
template <int FIRST, int END> __device__ __forceinline__ u32 lanes_max(u32 value) {
#pragma unroll
    for (int bit = FIRST; bit < END; bit <<= 1)
        value = max(value, __shfl_xor_sync(FULL_WARP, value, bit));
    return value;
}
template <int FIRST, int END> __device__ __forceinline__ int lanes_sum(int value) {
#pragma unroll
    for (int bit = FIRST; bit < END; bit <<= 1) value += __shfl_xor_sync(FULL_WARP, value, bit);
    return value;
}

// 8 numbers over their scale, rounded, as bytes; `squares` is the sum of theirs.
__device__ __forceinline__ uint2 codes_of(const float (&v)[WIDTH], float inverse, int& squares) {
    u32 c[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) c[i] = __float_as_uint(fmaf(v[i], inverse, ROUND));
    uint2 codes;
    codes.x = __byte_perm(__byte_perm(c[0], c[1], 0x40), __byte_perm(c[2], c[3], 0x40), 0x5410);
    codes.y = __byte_perm(__byte_perm(c[4], c[5], 0x40), __byte_perm(c[6], c[7], 0x40), 0x5410);
    squares = __dp4a(int(codes.x), int(codes.x), __dp4a(int(codes.y), int(codes.y), 0));
    return codes;
}

// What the warps of a block tell each other of a head's tile, for two heads in turn.
struct Exchange {
    u32 largest[2][WARPS];
    int squares[2][WARPS];
};

// The scale of a group of a tile's keys, of the warps' largest; by all lanes of a warp.
__device__ __forceinline__ float scale_of(const u32* largest, int group) {
    u32 mine = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w += GROUPS) mine = max(mine, largest[w + group]);
    const u32 all = warp_max(largest[threadIdx.x % WARPS]);
    // Inf or NaN: all of the tile's scales are NaN, so that no row's maximum passes over it.
    return all >= 0x7f800000 ? __uint_as_float(0x7fffffff) : step_of(mine);
}

// Some heads of a tile of 128 tokens, one after the other. The next one's rows come to shared memory
// meanwhile: each thread copies what it reads, so that nobody waits for others.
template <bool QUERY> struct Rows {
    const Params& p;
    const Side<QUERY> side;
    const int b, tile, first, lane, row, end;
    int h;
    uint4* const came;
    // Of the next head: where this thread's first row is.
    const char* from;
    float inverse[STEPS];

    __device__ __forceinline__ Rows(const Params& p, int unit, int part)
        : p(p), side(p), b(unit / side.tiles), tile(unit % side.tiles), first(tile * TILE),
          lane(threadIdx.x % LANES), row(threadIdx.x / LANES),
          end(min((part + 1) * side.HEADS, side.heads)), h(part * side.HEADS),
          came(reinterpret_cast<uint4*>(shared + ANGLE_TILES) + threadIdx.x),
          from(side.at(b, h, first + row, lane)) {
#pragma unroll
        for (int j = 0; j < STEPS; ++j) fetch(j);
        // The tile's angles: cos, then sin.
        const int bytes = ANGLES < 0 ? 0 : min(TILE, side.length - first) * ANGLE_ROW;
        for (int i = threadIdx.x * 16; i < bytes; i += THREADS * 16) {
            const long long angle = (long long)first * ANGLE_ROW + i;
            copy_async(shared + i, p.cos + angle);
            copy_async(shared + TILE * ANGLE_ROW + i, p.sin + angle);
        }
    }
    __device__ __forceinline__ int token(int j) const { return first + j * ROWS + row; }
    __device__ __forceinline__ bool whole() const { return first + TILE <= side.length; }
    __device__ __forceinline__ long long number() const {
        return (long long)(b * side.heads + h) * side.tiles + tile;
    }
    __device__ __forceinline__ void fetch(int j) const {
        if (token(j) < side.length)
            copy_async(came + j * THREADS, from + j * (2 * ROWS) * side.stride_l);
    }
    // Until the first head is there, and what else is waited for.
    __device__ __forceinline__ void begin(int unit, bool means) {
        const Counters counters(p);
        if (threadIdx.x == 0 && means) await(counters.means, p.batches * p.kv_heads);
        if (threadIdx.x == 32 && NORM == TOKEN && !QUERY) await(counters.k + unit, RMS_ITEMS);
        await_copies();
        __syncthreads();
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            const int at = min(token(j), side.length - 1);
            if (NORM == TOKEN && !QUERY)
                inverse[j] = __ldcg(p.k_inverse + (long long)b * side.length + at);
        }
    }
    __device__ __forceinline__ void weights(float (&w)[WIDTH], int token) const {
        if (side.WEIGHT >= 0) side.weights(w, h, token, p.first, lane);
    }
    // v = 8 channels of row j of this head, less the norm's factor, which is returned; of queries
    // that of a token is not known yet: `squares` gets theirs.
    __device__ __forceinline__ float take(float (&v)[WIDTH], const float (&w)[WIDTH], int j,
                                          float* squares = nullptr) const {
        const char* const cos = shared + (j * ROWS + row) * ANGLE_ROW + lane * 4 * ANGLE_BYTES;
        Vector<X> x;
        x.part[0] = came[j * THREADS];
        x.floats(v);
        if (squares) squares[j] += squares_of(v);
        if (h + 1 < end) fetch(j);
        float own[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) own[i] = w[i];
        if (side.SPLIT) weights(own, token(j));
        const float of_row = prepare<QUERY>(v, own, cos, cos + TILE * ANGLE_ROW, p.eps);
        return NORM == TOKEN && !QUERY ? inverse[j] : of_row;
    }
    // Tokens that fill the last tile up are zeros, whatever the angles say.
    __device__ __forceinline__ void clear(float (&v)[WIDTH], float& inverse, int j) const {
        if (token(j) < side.length) return;
        inverse = 0.0f;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v[i] = 0.0f;
    }
    __device__ __forceinline__ void mean_key(float (&mean)[WIDTH], int kv) const {
        const uint4* const at = reinterpret_cast<const uint4*>(p.k_mean + kv * D) + 2 * lane;
        Vector<FP32> read;
        read.part[0] = __ldcg(at), read.part[1] = __ldcg(at + 1);
        read.floats(mean);
    }
    // Where this thread's codes of its first row stand; those of row j are j · ROWS · D further.
    __device__ __forceinline__ char* place(char* codes) const {
        const u32 r = row, l = lane, chunk = SWIZZLED ? l / 2 ^ r % 8 : l / 2;
        return codes + number() * (TILE * D) + (r * D + chunk * 16 + l % 2 * 8);
    }
};

// The norm of a token, of all heads of a tile: what is written is multiplied with it.
__device__ __forceinline__ void scale_queries(const Params& p, int unit, int parts) {
    float* const inverse = reinterpret_cast<float*>(shared);
    const int tiles = count_of(p.queries, TILE), b = unit / tiles, first = unit % tiles * TILE;
    if (threadIdx.x < TILE) {
        const float* const squares = p.q_squares + (long long)unit * parts * TILE + threadIdx.x;
        float sum = 0.0f;
        for (int i = 0; i < parts; ++i) sum += __ldcg(squares + i * TILE);
        inverse[threadIdx.x] = inverse_of(sum, p.heads * D, p.eps);
    }
    __syncthreads();
    const int end = min(TILE, p.queries - first);
    for (int i = threadIdx.x; i < p.heads * TILE; i += THREADS) {
        const int row = i % TILE;
        const long long bh = b * p.heads + i / TILE, at = bh * tiles * TILE + first + row;
        const long long token = bh * p.queries + first + row;
        if (row >= end) continue;
        p.q_scale[at] = __ldcg(p.q_scale + at) * inverse[row];
        p.q_bound[at] = __ldcg(p.q_bound + at) * inverse[row];
        if (SHIFT) p.shift[token] = __ldcg(p.shift + token) * inverse[row];
    }
}

__device__ __forceinline__ void pack_queries(const Params& p, int unit, int part) {
    Rows<true> rows(p, unit, part);
    float token_squares[STEPS] = {};
    rows.begin(unit, SHIFT);
    for (; rows.h < rows.end; ++rows.h) {
        char* const to = rows.place(p.q_codes);
        float* const scales = p.q_scale + rows.number() * TILE + rows.row;
        float* const bounds = p.q_bound + rows.number() * TILE + rows.row;
        float w[WIDTH];
        if (!rows.side.SPLIT) rows.weights(w, 0);
        rows.from += 2 * rows.side.stride_h;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            float v[WIDTH];
            float inverse = rows.take(v, w, j, NORM == TOKEN ? token_squares : nullptr);
            if (SHIFT) {
                float mean[WIDTH], product = 0.0f;
                const int group = p.heads / p.kv_heads, token = rows.token(j);
                rows.mean_key(mean, rows.b * p.kv_heads + rows.h / group);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) product = fmaf(v[i], mean[i], product);
                product = lanes_sum<1, LANES>(product) * inverse * (p.factor * LN2);
                const long long bh = rows.b * p.heads + rows.h;
                if (rows.lane == 0 && token < p.queries) p.shift[bh * p.queries + token] = product;
            }
            if (!rows.whole()) {
                asm volatile("");
                rows.clear(v, inverse, j);
            }
            if (ROTATE) rotate(v, rows.lane);
            u32 largest = lanes_max<1, LANES>(largest_of(v));
            if (NORM == HEAD) largest = __float_as_uint(__uint_as_float(largest) * inverse);
            const float step = step_of(largest);
            // At most finite: zeros stay zeros.
            const float over = NORM == HEAD ? fminf(inverse * over_of(step), 3e38f) : over_of(step);
            int squares;
            __stcs(reinterpret_cast<uint2*>(to + j * (ROWS * D)), codes_of(v, over, squares));
            squares = lanes_sum<1, LANES>(squares);
            if (rows.lane == 0) {
                const float scaled = step * p.factor;
                scales[j * ROWS] = scaled;
                bounds[j * ROWS] = scaled * root(squares);
            }
        }
        await_copies();
    }
    if (NORM != TOKEN) return;
    const int parts = count_of(p.heads, Q_HEADS);
    float* const squares = p.q_squares + ((long long)unit * parts + part) * TILE + rows.row;
#pragma unroll
    for (int j = 0; j < STEPS; ++j) {
        const float sum = lanes_sum<1, LANES>(token_squares[j]);
        if (rows.lane == 0) squares[j * ROWS] = sum;
    }
    if (tell_last(Counters(p).q + unit, parts)) scale_queries(p, unit, parts);
}

__device__ __forceinline__ void pack_keys(const Params& p, int unit, int part) {
    __shared__ Exchange exchange;
    Rows<false> rows(p, unit, part);
    const int warp = threadIdx.x / 32, in_warp = threadIdx.x % 32;
    rows.begin(unit, true);
    int turn = 0;
    for (; rows.h < rows.end; ++rows.h, turn ^= 1) {
        float v[STEPS][WIDTH], w[WIDTH], mean[WIDTH], inverse[STEPS];
        u32 largest = 0;
        if (!rows.side.SPLIT) rows.weights(w, 0);
        rows.from += 2 * rows.side.stride_h;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) inverse[j] = rows.take(v[j], w, j);
        rows.mean_key(mean, rows.b * p.kv_heads + rows.h);
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                v[j][i] = NORM ? fmaf(v[j][i], inverse[j], -mean[i]) : v[j][i] - mean[i];
        }
        if (!rows.whole()) {
            // A branch, not selections for all tiles.
            asm volatile("");
#pragma unroll
            for (int j = 0; j < STEPS; ++j) rows.clear(v[j], inverse[j], j);
        }
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            if (ROTATE) rotate(v[j], rows.lane);
            largest = max(largest, largest_of(v[j]));
        }
        largest = warp_max(largest);
        if (in_warp == 0) exchange.largest[turn][warp] = largest;
        __syncthreads();
        const float step = scale_of(exchange.largest[turn], warp % GROUPS);
        const float over = over_of(step);
        const long long number = rows.number();
        char* const to = rows.place(p.k_codes);
        int longest = 0;
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            int squares;
            __stcs(reinterpret_cast<uint2*>(to + j * (ROWS * D)), codes_of(v[j], over, squares));
            longest = max(longest, lanes_sum<1, LANES>(squares));
        }
        longest = warp_max(longest);
        if (in_warp == 0) exchange.squares[turn][warp] = longest;
        if (in_warp == 0 && warp < GROUPS) p.k_scale[number * GROUPS + warp] = step;
        __syncthreads();
        if (warp == 0) {
            // Of lanes alike, the same.
            const int group = in_warp % GROUPS;
            int squares = 0;
#pragma unroll
            for (int n = 0; n < WARPS; n += GROUPS)
                squares = max(squares, exchange.squares[turn][n + group]);
            const float norm = scale_of(exchange.largest[turn], group) * root(squares);
            // NaN has the largest bits of all.
            const u32 bound = warp_max(__float_as_uint(norm));
            if (in_warp == 0) p.k_bound[number] = __uint_as_float(bound);
        }
        await_copies();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
pack_rows(const __grid_constant__ Params p) {
    take_turns(Counters(p).ticket, p.row_items, [&](u32 item) {
        const u32 heads = p.batches * p.kv_heads;
        if (item < heads) return mean_key(p, item);
        item -= heads;
        if (V && item < heads) return sample_values(p, item);
        item -= V ? heads : 0;
        bool early;
        int unit, part;
        const u32 q_parts = count_of(p.heads, Q_HEADS), k_parts = count_of(p.kv_heads, K_HEADS);
        const Stream q = {0, q_parts, u32(p.batches) * count_of(p.queries, TILE), 0};
        if (item < q.size()) {
            q.find(item, early, unit, part);
            return pack_queries(p, unit, part);
        }
        const Stream k = {NORM == TOKEN ? RMS_ITEMS : 0, k_parts,
                          u32(p.batches) * count_of(p.keys, TILE), u32(p.k_lag)};
        if (!k.find(item - q.size(), early, unit, part)) return;
        if (early) return inverse_rms(p, unit, part);
        pack_keys(p, unit, part);
    });
}
