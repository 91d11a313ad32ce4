// x · Wᵀ on Hopper: W in 4 bits, decoded to E4M3 in registers; x in E4M3, one scale per token.
//
// The product is W · xᵀ, as tensor cores take their left operand from registers. One warp copies
// packed W, its scales and x to shared memory, 128 columns a stage; each warpgroup decodes and
// multiplies 64 rows of W, and decodes ahead of the tensor cores: while they multiply one half of a
// stage, it decodes the other. Where tiles are fewer than multiprocessors, the two blocks of a
// cluster have a tile together: each multiplies half of the columns, and finishes half of the tokens
// with the sums that the other one sends.
//
// Compiled by NVRTC for sm_90a after ops/cuda/hopper.cu, the instruction `multiply` (hopper.py)
// and decode.cu. Defined from outside:
//   GROUP    elements of W that share a scale: 16, E4M3 scales; 32, E8M0 scales
//   GROUPS   warpgroups that multiply, each 64 rows of W
//   TOKENS   rows of x of a block of threads
//   STAGES   of shared memory
//   PARTS    blocks of a cluster, 1 or 2, which share the columns of a tile
//   OUT      type of the result

#define OUT_BF16 0
#define OUT_FP16 1
#define OUT_FP32 2

struct Params {
    const unsigned char* scale;  // of blocks of W, swizzled: [scale_rows, scale_columns, 512]
    const float* token_scale;    // [tokens], or [1]
    const float* tensor_scale;   // [1], or null
    const void* bias;            // [rows], or null
    void* out;                   // [tokens, rows]
    int token_step;              // 1, or 0 for one scale
    int bias_type;               // as OUT
    int rows, tokens, stages;    // stages: of 128 columns
    int scale_rows, scale_columns;
    Numbers numbers;
};

constexpr int COLUMNS = 128;
constexpr int ROWS = 64 * GROUPS;
constexpr int WARPS = 4 * GROUPS;
constexpr int SUMS = TOKENS / 2;
// Of a block's tokens, and of a thread's sums, those that the block finishes.
constexpr int OWN_TOKENS = TOKENS / PARTS;
constexpr int OWN_SUMS = SUMS / PARTS;
constexpr int X_BYTES = TOKENS * COLUMNS;
constexpr int W_ROW_BYTES = COLUMNS / 2;
constexpr int W_BYTES = ROWS * W_ROW_BYTES;
// Blocks of 128 rows of scales that the rows of a block of threads lie in.
constexpr int SCALE_ROWS = GROUPS <= 2 ? 1 : 2;
constexpr int CHANNEL_BYTES = 128;
// Loads that are under way together before the first product.
constexpr int AT_ONCE = 32;
constexpr int THREADS = 128 * (GROUPS + 1);
// Registers: of a thread when the kernel starts; of one that copies; then of one that multiplies.
constexpr int REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int FEW_REGISTERS = 24;
constexpr int ROOM = (REGISTERS * (GROUPS + 1) - FEW_REGISTERS) / GROUPS / 8 * 8;
constexpr int MANY_REGISTERS = ROOM < 240 ? ROOM : 240;

struct Shared {
    u32 x, w, scale, sums, full, empty, added;
};

// A place in the ring of stages.
typedef Slots<STAGES> Ring;

__device__ __forceinline__ int first_row() { return blockIdx.y * ROWS; }
__device__ __forceinline__ int first_token() { return blockIdx.x * TOKENS; }
// Which of the cluster's blocks this one is, and its first token in the tile.
__device__ __forceinline__ int part() { return PARTS == 1 ? 0 : blockIdx.z; }
__device__ __forceinline__ int first_own() { return part() * OWN_TOKENS; }
// Stages of the block: from its own first to the next block's.
__device__ __forceinline__ int first_stage(const Params& args, int of) {
    return args.stages * of / PARTS;
}
// Waits for the warpgroup; for all warpgroups that multiply.
__device__ __forceinline__ void group_sync() {
    asm volatile("bar.sync %0, 128;" ::"r"(2 + threadIdx.x / 128) : "memory");
}
__device__ __forceinline__ void all_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(128 * GROUPS) : "memory");
}

__device__ __forceinline__ void produce(const Params& args, const TensorMap* x, const TensorMap* w,
                                        const Shared& at) {
    Ring ring;
    int end = first_stage(args, part() + 1);
    // Of two blocks it would need more registers than it has if it were unrolled further.
#pragma unroll (PARTS == 1 ? 4 : 1)
    for (int i = first_stage(args, part()); i < end; ++i) {
        u32 full = at.full + 8 * ring.slot;
        barrier_wait(at.empty + 8 * ring.slot, ring.phase ^ 1);
        barrier_expect(full, X_BYTES + W_BYTES + SCALE_ROWS * SCALE_BYTES);
        copy_box(at.w + ring.slot * W_BYTES, w, i * W_ROW_BYTES, first_row(), full);
#pragma unroll
        for (int j = 0; j < SCALE_ROWS; ++j) {
            // Rows beyond the last may lie beyond the last block.
            int row = min(first_row() / 128 + j, args.scale_rows - 1);
            const unsigned char* from =
                args.scale + u64(row) * args.scale_columns * SCALE_BLOCK_BYTES + i * SCALE_BYTES;
            copy(at.scale + (ring.slot * SCALE_ROWS + j) * SCALE_BYTES, from, SCALE_BYTES, full);
        }
        copy_box(at.x + ring.slot * X_BYTES, x, i * COLUMNS, first_token(), full);
        ring.next();
    }
}

// Writes the largest byte of the scales of each of the warpgroup's 64 rows to `largest`.
__device__ __forceinline__ void find_largest(const Params& args, int row, int* largest) {
    int block = min(row / 128, args.scale_rows - 1), lane = threadIdx.x % 32;
    const unsigned char* from = args.scale + u64(block) * args.scale_columns * SCALE_BLOCK_BYTES +
                                lane * 16 + row % 128 / 64 * 8;
    u32 best[2][2] = {};
    for (int i = threadIdx.x % 128 / 32; i < args.scale_columns; i += 4 * AT_ONCE) {
        uint2 words[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            // The last one again, where there are no more.
            int column = min(i + 4 * j, args.scale_columns - 1);
            words[j] = *reinterpret_cast<const uint2*>(from + column * SCALE_BLOCK_BYTES);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            take_largest(best[0], words[j].x);
            take_largest(best[1], words[j].y);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 both = __vmaxu2(best[i][0], best[i][1]);
        atomicMax(largest + 32 * i + lane, int(max(both & 0xFFFF, both >> 16)));
    }
}

// What a thread needs of its rows, `row` of the 64 of the warpgroup and 8 below.
struct Rows {
    u32 w, scale;      // where its bytes begin, in the first stage
    float inverse[2];  // of the scales
    float factor[2];   // of the sums
    u32 bias[2];       // as it is stored
};

// One stage, decoded and multiplied in halves of 64 columns; the second half is still multiplied
// when it ends, so that `release`, the stage before, is free after the first.
__device__ __forceinline__ void advance(float (&sums)[SUMS], u32 (&a)[2][8], const Shared& at,
                                        const Rows& rows, int stage, u32 release,
                                        const Numbers& numbers) {
    u32 codes[2][4];
    float factor[2][FACTORS];
    Table table[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        u32 w = rows.w + stage * W_BYTES + r * 8 * W_ROW_BYTES;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(codes[r][0]), "=r"(codes[r][1]), "=r"(codes[r][2]), "=r"(codes[r][3])
                     : "r"(w) : "memory");
        u32 scale = rows.scale + stage * SCALE_ROWS * SCALE_BYTES + r * 8 * 16;
        factors_of(factor[r], scale, rows.inverse[r]);
    }
    u64 x = descriptor(at.x + stage * X_BYTES);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (half == 0 || NVFP4) table[r] = table_of(factor[r][half % FACTORS]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                u32 word = codes[r][2 * half + j];
                a[half][4 * j + r] = look_up(word, table[r], numbers);
                a[half][4 * j + 2 + r] = look_up(word >> 16, table[r], numbers);
            }
        }
        mma_fence();
        multiply(sums, a[half], x + 4 * half);
        multiply(sums, a[half] + 4, x + 4 * half + 2);
        mma_commit();
        mma_wait<1>();
        if (half == 0 && release && threadIdx.x % 32 == 0) barrier_arrive(release);
    }
}

__device__ __forceinline__ void consume(float (&sums)[SUMS], const Params& args, const Shared& at,
                                        const Rows& rows) {
    Ring ring;
    Numbers numbers = args.numbers;
    asm volatile("" : "+r"(numbers.positive));
    u32 a[2][8], release = 0;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums[i] = 0.0f;
    int count = first_stage(args, part() + 1) - first_stage(args, part());
    for (int i = 0; i < count; ++i) {
        barrier_wait(at.full + 8 * ring.slot, ring.phase);
        advance(sums, a, at, rows, ring.slot, release, numbers);
        release = at.empty + 8 * ring.slot;
        ring.next();
    }
    mma_wait<0>();
    // Keeps the compiler from using them before the wait.
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// own = the sums of the block's own tokens, with those of the other block of the cluster, of which
// a thread has the same as the one of its number here.
__device__ __forceinline__ void add_up(float (&own)[OWN_SUMS], const float (&sums)[SUMS],
                                       const Shared& at) {
    if constexpr (PARTS == 1) {
#pragma unroll
        for (int i = 0; i < OWN_SUMS; ++i) own[i] = sums[i];
    } else {
        constexpr int STEP = 16 * 128 * GROUPS;
        bool second = blockIdx.z == 1;
        u32 here = at.sums + threadIdx.x * 16, other = blockIdx.z ^ 1;
        u32 there = address_in_block(here, other), added = address_in_block(at.added, other);
        // The other one runs.
        cluster_wait();
#pragma unroll
        for (int i = 0; i < OWN_SUMS; i += 4) {
            float sent[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sent[j] = second ? sums[i + j] : sums[OWN_SUMS + i + j];
                own[i + j] = second ? sums[OWN_SUMS + i + j] : sums[i + j];
            }
            send(there + i / 4 * STEP, sent, added);
        }
        barrier_wait_for_cluster(at.added, 0);
#pragma unroll
        for (int i = 0; i < OWN_SUMS; i += 4) {
            float more[4];
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(more[0]), "=f"(more[1]), "=f"(more[2]), "=f"(more[3])
                         : "r"(here + i / 4 * STEP) : "memory");
#pragma unroll
            for (int j = 0; j < 4; ++j) own[i + j] += more[j];
        }
    }
}

__device__ __forceinline__ u32 load_bias(const Params& args, int row) {
    if (!args.bias || row >= args.rows) return 0;
    if (args.bias_type == OUT_FP32) return static_cast<const u32*>(args.bias)[row];
    return static_cast<const unsigned short*>(args.bias)[row];
}
__device__ __forceinline__ float bias_of(const Params& args, u32 bits) {
    if (args.bias_type == OUT_FP32) return __uint_as_float(bits);
    if (args.bias_type == OUT_BF16) return __uint_as_float(bits << 16);
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
    return value;
}

// sums = sums · scale of the token · scale of the row + bias.
__device__ __forceinline__ void finish(float (&sums)[OWN_SUMS], const Params& args,
                                       const Rows& rows, const float* token_scale) {
    float bias[2] = {bias_of(args, rows.bias[0]), bias_of(args, rows.bias[1])};
#pragma unroll
    for (int i = 0; i < OWN_TOKENS / 8; ++i) {
        float2 token =
            *reinterpret_cast<const float2*>(token_scale + 8 * i + threadIdx.x % 4 * 2);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* sum = sums + 4 * i + 2 * r;
            sum[0] = sum[0] * token.x * rows.factor[r] + bias[r];
            sum[1] = sum[1] * token.y * rows.factor[r] + bias[r];
        }
    }
}

#if OUT == OUT_FP32
// Eight lanes write a sector.
__device__ __forceinline__ void store(const float (&sums)[OWN_SUMS], const Params& args, int row,
                                      u32) {
    row += threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < OWN_SUMS; ++i) {
        int token = first_token() + first_own() + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        int channel = row + i / 2 % 2 * 8;
        if (token < args.tokens && channel < args.rows)
            static_cast<float*>(args.out)[u64(token) * args.rows + channel] = sums[i];
    }
}
#else
// By way of shared memory: a row of 64 channels for each token, its 16-byte chunks XORed with the
// token's number modulo 8.
__device__ __forceinline__ void store(const float (&sums)[OWN_SUMS], const Params& args, int row,
                                      u32 staged) {
    int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
    for (int i = 0; i < OWN_TOKENS / 8; i += 2) {
        u32 pair[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
#if OUT == OUT_FP16
            asm("cvt.rn.f16x2.f32 %0, %1, %2;"
#else
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
#endif
                : "=r"(pair[j]) : "f"(sums[4 * i + 2 * j + 1]), "f"(sums[4 * i + 2 * j]));
        int token = 8 * (i + lane / 16) + lane % 8, chunk = 2 * warp + lane / 8 % 2;
        u32 to = staged + token * CHANNEL_BYTES + (chunk ^ (token % 8)) * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(to), "r"(pair[0]), "r"(pair[1]), "r"(pair[2]), "r"(pair[3]) : "memory");
    }
    group_sync();
#pragma unroll
    for (int i = threadIdx.x % 128; i < OWN_TOKENS * 8; i += 128) {
        int token = i / 8, chunk = i % 8;
        uint4 eight;
        u32 from = staged + token * CHANNEL_BYTES + (chunk ^ (token % 8)) * 16;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(eight.x), "=r"(eight.y), "=r"(eight.z), "=r"(eight.w)
                     : "r"(from) : "memory");
        int channel = row + chunk * 8;
        token += first_token() + first_own();
        if (token < args.tokens && channel < args.rows)
            *reinterpret_cast<uint4*>(static_cast<unsigned short*>(args.out) +
                                      u64(token) * args.rows + channel) = eight;
    }
}
#endif

// What a warpgroup does: 64 rows of the result.
__device__ __forceinline__ void work(const Params& args, const Shared& at, int* largest,
                                     float* token_scale) {
    int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    int row = first_row() + 64 * group, channel = threadIdx.x % 128 / 32 * 16 + lane / 4;
    // What comes from memory is on its way together.
    float tensor = args.tensor_scale ? *args.tensor_scale : 1.0f;
    Rows rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.bias[r] = load_bias(args, row + channel + 8 * r);
    largest += 64 * group;
    find_largest(args, row, largest);
    for (int i = threadIdx.x; i < TOKENS; i += 128 * GROUPS) {
        int token = min(first_token() + i, args.tokens - 1);
        copy_word(shared_address(token_scale + i), args.token_scale + token * args.token_step);
    }
    group_sync();
    rows.w = at.w + (64 * group + channel) * W_ROW_BYTES + lane % 4 * 16;
    int in_block = row % 128 + channel;
    rows.scale = at.scale + (row / 128 - first_row() / 128) * SCALE_BYTES + in_block % 32 * 16 +
                 in_block / 32 * 4;
    rows.scale += NVFP4 ? lane % 4 / 2 * SCALE_BLOCK_BYTES + lane % 2 * 2 : lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        RowScale found = row_scale(largest[channel + 8 * r]);
        rows.inverse[r] = __uint_as_float(found.inverse);
        // The operand is negated.
        rows.factor[r] = -__uint_as_float(found.scale) * tensor;
    }
    float sums[SUMS];
    consume(sums, args, at, rows);
    await_words();
    // The stages are read no more, and the scales of the tokens are there.
    all_sync();
    float own[OWN_SUMS];
    add_up(own, sums, at);
    finish(own, args, rows, token_scale + first_own());
    store(own, args, row, at.x + group * OWN_TOKENS * CHANNEL_BYTES);
}

#if PARTS > 1
#define IN_CLUSTERS __cluster_dims__(1, 1, PARTS)
#else
#define IN_CLUSTERS
#endif

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1)
fp4_scaled_mm(const __grid_constant__ Params args, const __grid_constant__ TensorMap x,
              const __grid_constant__ TensorMap w) {
    extern __shared__ char raw[];
    __shared__ __align__(8) u64 barriers[2 * STAGES + (PARTS > 1)];
    __shared__ int largest[ROWS];
    __shared__ __align__(8) float token_scale[TOKENS];
    Shared at;
    at.x = (shared_address(raw) + 1023) & ~1023u;
    at.w = at.x + STAGES * X_BYTES;
    at.scale = at.w + STAGES * W_BYTES;
    at.sums = at.scale + STAGES * SCALE_ROWS * SCALE_BYTES;
    at.full = shared_address(barriers);
    at.empty = at.full + 8 * STAGES;
    at.added = at.empty + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(at.full + 8 * i, 1);
            barrier_init(at.empty + 8 * i, WARPS);
        }
        if (PARTS > 1) barrier_init(at.added, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
        if (PARTS > 1) barrier_expect(at.added, OWN_SUMS * 4 * 128 * GROUPS);
    }
    for (int i = threadIdx.x; i < ROWS; i += THREADS) largest[i] = 0;
    if (threadIdx.x == 128 * GROUPS) {
        prefetch_map(&x);
        prefetch_map(&w);
    }
    __syncthreads();
    if (PARTS > 1) cluster_arrive();
    await_kernel_before();
    if (__shfl_sync(0xffffffff, threadIdx.x / 128, 0) == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW_REGISTERS));
        if (threadIdx.x == 128 * GROUPS) produce(args, &x, &w, at);
        if (PARTS > 1) cluster_wait();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY_REGISTERS));
        work(args, at, largest, token_scale);
    }
}
