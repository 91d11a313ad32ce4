// The kernel: who copies, who multiplies, in which order. See machine.cu.

// What a block does: a tile of rows of a head, against tiles of keys, the last one first.
struct Part {
    u32 batch, head, bh, kv_head, bkv, tile;
    int begin, end;  // tiles of keys
    int split;       // number of the tile of rows among those of shared keys; -1 if it is none
    int index;       // of the block, of those that share them
};
// Computed anew from the block's number wherever it is wanted, and so not held in registers.
__device__ __forceinline__ Part part_of(const Params& args) {
    u32 block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    u32 rank = block % CLUSTER, unit = block / CLUSTER, place, rest;
    Part part;
    part.begin = 0, part.end = args.blocks, part.split = -1, part.index = 0;
    if (unit >= args.whole) {
        u32 number = args.parts.divide(unit - args.whole, rest);
        part.index = rest;
        part.split = number * CLUSTER + rank;
        part.begin = args.parts.divide(args.blocks * part.index, rest);
        part.end = args.parts.divide(args.blocks * (part.index + 1), rest);
        unit = args.whole + number;
    }
    part.bh = args.units.divide(unit, place);
    part.batch = args.heads.divide(part.bh, part.head);
    part.kv_head = args.group.divide(part.head, rest);
    part.bkv = args.group.divide(part.bh, rest);
    // Blocks that fill up the last cluster do what the last tile's does.
    part.tile = CLUSTER == 1 ? place : min(place * CLUSTER + rank, u32(args.tiles - 1));
#if CAUSAL
    // No keys are shared. Tiles of rows that see the most begin first. Of the last tile that they see
    // some keys may be none, or later than a row.
    part.tile = args.tiles - 1 - part.tile;
    part.end = min(args.blocks, part.tile + 1);
#endif
    return part;
}

struct Shared {
    u32 q, k, v, k_scale, bias, q_full, k_full, k_empty, v_full, v_empty;
};

// A place in the ring of stages.
typedef Slots<STAGES> Ring;

// Of each tile of K and V a block copies its share, to all blocks of its cluster.
__device__ __forceinline__ void fetch_keys(const Params& args, const Part& part, const Shared& at,
                                           int slot, int block) {
    u64 tile = u64(part.bkv) * args.blocks + block;
    u32 full = at.k_full + 8 * slot;
    barrier_expect(full, K_BYTES + 16 + BIAS_BYTES);
    constexpr u32 SHARE = K_BYTES / CLUSTER;
    u32 begin = CLUSTER == 1 ? 0 : block_in_cluster() * SHARE;
    copy_to_all<CLUSTER>(at.k + slot * K_BYTES + begin, args.k + tile * K_BYTES + begin, SHARE,
                         full);
    copy(at.k_scale + slot * 16, args.k_scale + tile * 4, 16, full);
#if BIASED
    const float* bias = args.bias + part.batch * args.bias_b + part.head * args.bias_h;
    copy(at.bias + slot * BIAS_BYTES, bias + u64(block) * BIASES, BIAS_BYTES, full);
#endif
}

__device__ __forceinline__ void fetch_values(const Params& args, const TensorMap* map,
                                             const Part& part, const Shared& at, int slot,
                                             int block) {
    u32 full = at.v_full + 8 * slot, to = at.v + slot * V_STRIDE;
    u32 rank = CLUSTER == 1 ? 0 : block_in_cluster();
    barrier_expect(full, V_BYTES);
#if PV == PV_EXACT
    for (u32 box = rank; box < 2; box += CLUSTER)
        copy_box_to_all<CLUSTER>(to + box * (V_BYTES / 2), map, 64 * box, block * N, part.kv_head,
                                 part.batch, full);
#else
    constexpr u32 SHARE = V_BYTES / CLUSTER;
    const char* const from = args.v + (u64(part.bkv) * args.blocks + block) * V_BYTES;
    copy_to_all<CLUSTER>(to + rank * SHARE, from + rank * SHARE, SHARE, full);
#endif
}

__device__ __forceinline__ void produce(const Params& args, const TensorMap* map,
                                        const Shared& at) {
    const Part part = part_of(args);
    barrier_expect(at.q_full, Q_BYTES);
    copy(at.q, args.q + (u64(part.bh) * args.tiles + part.tile) * Q_BYTES, Q_BYTES, at.q_full);
    Ring ring;
    for (int block = part.end - 1; block >= part.begin; --block) {
        barrier_wait(at.k_empty + 8 * ring.slot, ring.phase ^ 1);
        fetch_keys(args, part, at, ring.slot, block);
        barrier_wait(at.v_empty + 8 * ring.slot, ring.phase ^ 1);
        fetch_values(args, map, part, at, ring.slot, block);
        ring.next();
    }
}

// Of a thread's two rows the first, of a tile's.
__device__ __forceinline__ int row_of_thread(int group) {
    return group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
}

// What a warpgroup works with, and where it is. Beside it: o, P·V summed; acc, where the tensor
// cores sum: o itself in 16 bits; else apart, and added to o (`fold`): FP8 after so many tiles that
// its sums, which the tensor cores cut off after some 14 bits, lose little.
struct Work {
    const Params& args;
    const Shared& at;
    const Query& q;
    int group;
    int tile, end;  // of keys: the first one's number here, and the one after the last one's
    Ring ring;    // tile to be multiplied by Q
    Ring before;  // tile to be multiplied by P
};

// INT8: a tile's P·V counts times the tile's factor, and yet `acc` runs on from tile to tile. With
// sums A1, A2, A3 after tiles of factors f1, f2, f3 that is f1·A1 + f2·(A2 - A1) + f3·(A3 - A2), or
// (f1 - f2)·A1 + (f2 - f3)·A2 + f3·A3: one multiplication for each. As BEGIN is in every sum, `o`
// begins with -f1·BEGIN, and holds -f·BEGIN for the factor f of the tile that comes next.
#if PV == PV_INT8
__device__ __forceinline__ void fold(float (&o)[SUMS], int (&acc)[SUMS], const Rows& rows) {
    if (rows.begin) {
#pragma unroll
        for (int j = 0; j < SUMS; ++j) {
            int r = (j / 2) % 2;
            o[j] = fmaf(__int_as_float(acc[j]), rows.pending[r], o[j]) - BEGIN * rows.part[r];
            acc[j] = __float_as_int(BEGIN);
        }
    } else {
        float factor[2] = {rows.pending[0] - rows.part[0], rows.pending[1] - rows.part[1]};
#pragma unroll
        for (int j = 0; j < SUMS; ++j)
            o[j] = fmaf(__int_as_float(acc[j]), factor[(j / 2) % 2], o[j]);
    }
}
__device__ __forceinline__ void fold_last(float (&o)[SUMS], int (&acc)[SUMS], const Rows& rows) {
#pragma unroll
    for (int j = 0; j < SUMS; ++j)
        o[j] = fmaf(__int_as_float(acc[j]), rows.part[(j / 2) % 2], o[j]);
}
#elif PV == PV_FP8
__device__ __forceinline__ void fold(float (&o)[SUMS], const float (&acc)[SUMS], const Rows&) {
#pragma unroll
    for (int j = 0; j < SUMS; ++j) o[j] += acc[j];
}
__device__ __forceinline__ void fold_last(float (&o)[SUMS], const float (&acc)[SUMS],
                                          const Rows& rows) {
    fold(o, acc, rows);
}
#else
__device__ __forceinline__ void fold(float (&)[SUMS], const float (&)[SUMS], const Rows&) {}
__device__ __forceinline__ void fold_last(float (&)[SUMS], const float (&)[SUMS], const Rows&) {}
#endif
// Whether `acc` is to be folded before it takes P·V number n, which then starts a new sum.
__device__ __forceinline__ bool is_full(int n) { return PV != PV_FP8 || n % TILES_SUMMED == 0; }
// Whether P·V is added to what `acc` holds after that.
__device__ __forceinline__ bool runs_on(bool full) { return PV == PV_INT8 || !full; }

// Says that a warp has read a stage, to all blocks of the cluster: each copies a part of the next.
__device__ __forceinline__ void release(u32 bar) {
    u32 lane = threadIdx.x % 32;
    if (CLUSTER == 1 && lane == 0) barrier_arrive(bar);
    if (CLUSTER > 1 && lane < CLUSTER) barrier_arrive_at(bar, lane);
}

// The softmax of a tile, by its bias where it has one.
template <bool FIRST, bool BOUNDED, bool FAR>
__device__ __forceinline__ bool softmax_of(float (&p)[64], const int (&s)[64], Rows& rows,
                                           float k_scale, u32 bias) {
#if BIASED
    // NaN is not zero either.
    if (any_bias(bias) != 0.0f) return softmax_biased<FIRST>(p, s, rows, k_scale, bias);
#endif
    return softmax<FIRST, BOUNDED, FAR>(p, s, rows, k_scale);
}

// One tile: S of tile i beside P·V of the tile before, whose P is in `p`; P of tile i to `p`.
template <bool BOUNDED, bool FAR>
__device__ __forceinline__ void advance(Work& work, int i, float (&o)[SUMS], Sum (&acc)[SUMS],
                                        u32 (&p)[P_REGISTERS], Rows& rows) {
    const Shared& at = work.at;
    bool last = i + 1 == work.end;
    int s[64];
    if (PINGPONG) named_sync(1 + work.group);
    settle(s);
    settle(acc);
    mma_fence();
    multiply_qk(s, work.q, descriptor(at.k + work.ring.slot * K_BYTES));
    mma_commit();
    barrier_wait(at.v_full + 8 * work.before.slot, work.before.phase);
    bool full = is_full(i - 1);
    if (full) fold(o, acc, rows);
    mma_fence();
    multiply_pv(acc, p, descriptor(at.v + work.before.slot * V_STRIDE, V_BYTES / 2), runs_on(full));
    mma_commit();
    if (PINGPONG && !(work.group == 1 && last)) named_arrive(2 - work.group);
    mma_wait<1>();
    settle(s);
    float k_scale;
    asm volatile("ld.shared.f32 %0, [%1];"
                 : "=f"(k_scale)
                 : "r"(at.k_scale + work.ring.slot * 16 + threadIdx.x % 4 * 4) : "memory");
    __syncwarp();
    if (!BIASED) release(at.k_empty + 8 * work.ring.slot);
    float x[64];
    rows.pending[0] = rows.part[0];
    rows.pending[1] = rows.part[1];
    u32 bias = at.bias + work.ring.slot * BIAS_BYTES;
    bool moved = softmax_of<false, BOUNDED, FAR>(x, s, rows, k_scale, bias);
    if (BIASED) {
        __syncwarp();
        release(at.k_empty + 8 * work.ring.slot);
    }
    u32 packed[P_REGISTERS];
    if (DOUBLE) pack_all(packed, x);
    int used = work.before.slot;
    work.before = work.ring;
    work.ring.next();
    // Here, so that the compiler moves no exponential past the wait for P·V.
    if (!last) barrier_wait(at.k_full + 8 * work.ring.slot, work.ring.phase);
    mma_wait<0>();
    settle(acc);
    release(at.v_empty + 8 * used);
    if (moved) {
        rows.pending[0] *= rows.keep[0];
        rows.pending[1] *= rows.keep[1];
#pragma unroll
        for (int j = 0; j < SUMS; ++j) {
            o[j] *= rows.keep[(j / 2) % 2];
            if (PV == PV_FP8) acc[j] *= rows.keep[(j / 2) % 2];
        }
    }
    if (DOUBLE) {
        // The compiler lets products wait for each other if what is packed here is their operand.
#pragma unroll
        for (int j = 0; j < P_REGISTERS; ++j)
            asm volatile("mov.b32 %0, %1;" : "=r"(p[j]) : "r"(packed[j]));
    } else {
        pack_all(p, x);
    }
    add_sums(rows, p);
}

// The tiles after the first one, whose P is in `p`.
template <bool BOUNDED, bool FAR>
__device__ __forceinline__ void consume(Work& work, float (&o)[SUMS], u32 (&p)[P_REGISTERS],
                                        Rows& rows) {
    const Shared& at = work.at;
#if PV != PV_EXACT
    Sum acc[SUMS];
#pragma unroll
    for (int j = 0; j < SUMS; ++j) acc[j] = 0;
    rows.pending[0] = rows.pending[1] = 0.0f;
    rows.begin = true;
#else
    float(&acc)[SUMS] = o;
#endif
    if (PINGPONG && work.group == 1 && work.tile + 1 < work.end) named_arrive(1);
    if (work.tile + 1 < work.end) barrier_wait(at.k_full + 8 * work.ring.slot, work.ring.phase);
    for (int i = work.tile + 1; i < work.end; ++i)
        advance<BOUNDED, FAR>(work, i, o, acc, p, rows);
    barrier_wait(at.v_full + 8 * work.before.slot, work.before.phase);
    settle(acc);
    bool full = is_full(work.end - 1);
    if (full) fold(o, acc, rows);
    mma_fence();
    multiply_pv(acc, p, descriptor(at.v + work.before.slot * V_STRIDE, V_BYTES / 2), runs_on(full));
    mma_commit();
    mma_wait<0>();
    settle(acc);
    fold_last(o, acc, rows);
}

// Adds up what the threads of a row have, so that all of these know P's sum.
__device__ __forceinline__ void sum_rows(const float (&o)[SUMS], Rows& rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#if PV == PV_FP8
        // Of the columns behind V's channels the first thread of four has the first.
        rows.sum[r] = __shfl_sync(0xffffffff, o[64 + 2 * r], threadIdx.x % 32 & ~3);
#else
        rows.sum[r] += __shfl_xor_sync(0xffffffff, rows.sum[r], 1);
        rows.sum[r] += __shfl_xor_sync(0xffffffff, rows.sum[r], 2);
#endif
    }
}

// Where blocks share the keys of rows: leaves what this one has to the last of them to come here.
// Returns whether that is this one, which has it all then: parts are added in their order, whoever is
// the last.
__device__ __forceinline__ bool joined(const Params& args, const Part& part, float (&o)[SUMS],
                                       Rows& rows, u32* turn) {
    constexpr int THREADS = CONSUMERS * 128;
    float* const of_rows =
        args.partial + u64(part.split) * args.parts.divisor * PARTIAL + threadIdx.x;
    float* const mine = of_rows + part.index * PARTIAL;
#pragma unroll
    for (int j = 0; j < 64; ++j) __stcg(mine + j * THREADS, o[j]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        __stcg(mine + (64 + r) * THREADS, rows.sum[r]);
        __stcg(mine + (66 + r) * THREADS, rows.top[r]);
    }
    __threadfence();
    all_consumers();
    if (threadIdx.x == 0) *turn = atomicAdd(args.done + part.split, 1);
    all_consumers();
    if (*turn + 1 != args.parts.divisor) return false;
    __threadfence();
    float top[2] = {rows.top[0], rows.top[1]};
    for (u32 i = 0; i < args.parts.divisor; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            top[r] = fmaxf(top[r], __ldcg(of_rows + i * PARTIAL + (66 + r) * THREADS));
#pragma unroll
    for (int j = 0; j < 64; ++j) o[j] = 0.0f;
    rows.sum[0] = rows.sum[1] = 0.0f;
    for (u32 i = 0; i < args.parts.divisor; ++i) {
        const float* const from = of_rows + i * PARTIAL;
        float keep[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            keep[r] = exp2(__ldcg(from + (66 + r) * THREADS) - top[r]);
            rows.sum[r] = fmaf(__ldcg(from + (64 + r) * THREADS), keep[r], rows.sum[r]);
        }
#pragma unroll
        for (int j = 0; j < 64; ++j)
            o[j] = fmaf(__ldcg(from + j * THREADS), keep[(j / 2) % 2], o[j]);
    }
    rows.top[0] = top[0];
    rows.top[1] = top[1];
    return true;
}

// Transposes 4 × 4 words among four threads, four times: what lay 16 bytes apart in a thread is then
// in four threads, and each has four words that are neighbours in memory.
__device__ __forceinline__ void exchange(u32 (&x)[16]) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        bool high = threadIdx.x & step;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (i & step) continue;
            u32 got = __shfl_xor_sync(0xffffffff, high ? x[i] : x[i + step], step);
            (high ? x[i] : x[i + step]) = got;
        }
    }
}

// Divides by the sums, and stores rows `row` and `row` + 8.
__device__ __forceinline__ void finish(const Params& args, const Part& part, const float (&o)[SUMS],
                                       const Rows& rows, int row) {
    int lane = threadIdx.x % 4;
    float inverse[2];
    u32 words[2][16];
#pragma unroll
    for (int r = 0; r < 2; ++r)
        inverse[r] = BIASED && rows.sum[r] == 0.0f ? 0.0f : 1.0f / rows.sum[r];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#if PV != PV_EXACT
        // By the path of what nobody writes, so that no load waits for the stores below.
        u64 channel = u64(part.bkv) * D + 8 * j + 2 * lane;
        float2 scale = __ldg(reinterpret_cast<const float2*>(args.v_scale + channel));
        float2 mean = __ldg(reinterpret_cast<const float2*>(args.v_offset + channel));
#endif
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float x = o[4 * j + 2 * r] * inverse[r], y = o[4 * j + 2 * r + 1] * inverse[r];
#if PV != PV_EXACT
            bool none = BIASED && rows.sum[r] == 0.0f;
            x = fmaf(x, scale.x, none ? 0.0f : mean.x);
            y = fmaf(y, scale.y, none ? 0.0f : mean.y);
#endif
            asm("cvt.rn." HALF "x2.f32 %0, %1, %2;" : "=r"(words[r][j]) : "f"(y), "f"(x));
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        exchange(words[r]);
        int at = row + 8 * r;
        if (at >= args.rows) continue;
        char* out = static_cast<char*>(args.out) +
                    2 * (part.batch * args.out_b + part.head * args.out_h + at * args.out_l);
#pragma unroll
        for (int j = 0; j < 16; j += 4)
            *reinterpret_cast<uint4*>(out + 16 * (j + lane)) =
                make_uint4(words[r][j], words[r][j + 1], words[r][j + 2], words[r][j + 3]);
        if (args.lse && lane == 0) {
            float top = rows.top[r] - (PV == PV_INT8 ? LOG2_255 : 0.0f);
            args.lse[u64(part.bh) * args.rows + at] =
                (log2(rows.sum[r]) + top) * 0.6931471805599453f;
        }
    }
}

// What is known of the logits of a warpgroup's rows by the norms of query and key (Cauchy-Schwarz).
struct Logits {
    bool bounded;  // none can be SAFE above the first tile's maximum
    bool far;      // one may be beyond NEARBY
};
// The largest norm of a head's keys.
__device__ __forceinline__ float longest_key(const Params& args, const Part& part, float* scratch) {
    const float* const bounds = args.k_bound + u64(part.bkv) * args.blocks;
    float k = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < args.blocks; i += 128) k = fmaxf(k, bounds[i]);
#pragma unroll
    for (int step = 16; step; step /= 2) k = fmaxf(k, __shfl_xor_sync(0xffffffff, k, step));
    int group = threadIdx.x / 128;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = k;
    all_of_group(3 + group, true);
#pragma unroll
    for (int i = 0; i < 4; ++i) k = fmaxf(k, scratch[group * 4 + i]);
    return k;
}
// bound: of the magnitudes of the logits of a thread's rows.
__device__ __forceinline__ Logits logits_of(const Rows& rows, const float (&bound)[2]) {
    int group = threadIdx.x / 128;
    bool holds = bound[0] - rows.top[0] <= SAFE && bound[1] - rows.top[1] <= SAFE;
    // NaN and Inf stay NaN either way, and leave the other rows as they are.
    float most = fmaxf(bound[0], bound[1]);
    bool far = most > NEARBY && most < __int_as_float(0x7f800000);
    Logits known;
    // P in FP16 has a narrow range itself.
    known.bounded = all_of_group(3 + group, holds && !(PV == PV_EXACT && FP16));
    known.far = PV != PV_EXACT && !all_of_group(3 + group, !far);
    return known;
}

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(384, 1)
attention(const __grid_constant__ Params args, const __grid_constant__ TensorMap map) {
    extern __shared__ char raw[];
    __shared__ __align__(8) u64 barriers[1 + 4 * STAGES];
    __shared__ __align__(16) float scales[STAGES * 4];
    __shared__ float scratch[WARPS];
    __shared__ u32 turn;
    __shared__ __align__(16) float biases[BIASED ? STAGES * BIASES : 1];
    Shared at;
    at.q = (shared_address(raw) + 1023) & ~1023u;
    at.k = at.q + Q_BYTES;
    at.v = at.k + STAGES * K_BYTES;
    at.k_scale = shared_address(scales);
    at.bias = shared_address(biases);
    at.q_full = shared_address(barriers);
    at.k_full = at.q_full + 8;
    at.k_empty = at.k_full + 8 * STAGES;
    at.v_full = at.k_empty + 8 * STAGES;
    at.v_empty = at.v_full + 8 * STAGES;
    if (threadIdx.x == 0) {
        barrier_init(at.q_full, 1);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(at.k_full + 8 * i, 1);
            barrier_init(at.v_full + 8 * i, 1);
            barrier_init(at.k_empty + 8 * i, WARPS * CLUSTER);
            barrier_init(at.v_empty + 8 * i, WARPS * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
#if PV == PV_FP8
    for (u32 i = threadIdx.x; i < STAGES * ONES_BYTES / 4; i += blockDim.x) {
        // 1 in E4M3, four times.
        u32 ones = i % (ONES_BYTES / 4) < N / 4 ? 0x38383838 : 0;
        u32 to = at.v + i / (ONES_BYTES / 4) * V_STRIDE + V_BYTES + i % (ONES_BYTES / 4) * 4;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(ones) : "memory");
    }
#endif
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();
    int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (group == CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == CONSUMERS * 128) produce(args, &map, at);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Part part = part_of(args);
        int row = part.tile * M + row_of_thread(group);
        u64 number = u64(part.bh) * args.tiles * M + row;
        Rows rows;
        float bound[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            rows.scale[r] = args.q_scale[number + 8 * r];
            bound[r] = args.q_bound[number + 8 * r];
        }
        rows.sum[0] = rows.sum[1] = 0.0f;
        rows.codes[0] = rows.codes[1] = 0;
        rows.zero = blockDim.y - 1;
        Query q;
        float o[SUMS];
        u32 p[P_REGISTERS];
#pragma unroll
        for (int i = 0; i < SUMS; ++i) o[i] = 0.0f;
        // While Q and K come.
        float longest = longest_key(args, part, scratch);
        bound[0] *= longest;
        bound[1] *= longest;
        {
            int s[64];
            barrier_wait(at.q_full, 0);
            load(q, at.q + group * Q_BYTES / 2);
            barrier_wait(at.k_full, 0);
            settle(s);
            mma_fence();
            multiply_qk(s, q, descriptor(at.k));
            mma_commit();
            mma_wait<0>();
            settle(s);
            float k_scale = scales[threadIdx.x % 4];
            __syncwarp();
            if (!BIASED) release(at.k_empty);
            int before = (part.end - 1) * N;
            int valid = args.keys - before;
            if (CAUSAL || valid < N) {
#pragma unroll
                for (int i = 0; i < 64; ++i) {
                    u32 key = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
                    bool later = CAUSAL && key + before > row + (i / 2) % 2 * 8;
                    if (key >= valid || later) s[i] = EMPTY;
                }
            }
            float x[64];
            softmax_of<true, false, true>(x, s, rows, k_scale, at.bias);
            if (BIASED) {
                __syncwarp();
                release(at.k_empty);
            }
            pack_all(p, x);
            add_sums(rows, p);
        }
        // Broadcast, so that the compiler knows that no warp diverges. It orders the loop of exact
        // better where the end is a parameter (5% less time), and that of the others where the
        // beginning is a constant (0.5%).
        int tiles = __shfl_sync(0xffffffff, part.end - part.begin, 0);
        Work work = {args, at, q, group, 0, tiles};
        if (PV == PV_EXACT) work.tile = args.blocks - tiles, work.end = args.blocks;
        work.ring.next();
        Logits logits = logits_of(rows, bound);
        if (__shfl_sync(0xffffffff, PV != PV_EXACT && logits.far, 0))
            consume<false, true>(work, o, p, rows);
        else if (__shfl_sync(0xffffffff, logits.bounded, 0))
            consume<true, false>(work, o, p, rows);
        else
            consume<false, false>(work, o, p, rows);
        part = part_of(args);
        sum_rows(o, rows);
        if (part.split < 0 || joined(args, part, o, rows, &turn))
            finish(args, part, o, rows, part.tile * M + row_of_thread(group));
    }
    // No block leaves while another one may still write to its shared memory.
    if (CLUSTER > 1) cluster_sync();
}
