// The kernel: copies, products, and the order of its steps.

// Has the scales that `find_largest` reads fetched to the L2 cache, by blocks that may have to await
// the kernel before: those that come first.
__device__ __forceinline__ void fetch_scales(const Params& args) {
    if (blockIdx.y * gridDim.x + blockIdx.x >= processors()) return;
    u32 bytes = args.scale_columns * SCALE_BLOCK_BYTES;
    const unsigned char* from = args.scale + u64(first_row() / 128) * bytes;
    for (u32 i = threadIdx.x * LINE_BYTES; i < bytes; i += THREADS * LINE_BYTES)
        prefetch_line(from + i);
    if (threadIdx.x == 0 && args.tensor_scale) prefetch_line(args.tensor_scale);
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

// Writes the largest byte of the scales of each of the warpgroup's 64 rows to `largest`; of two
// warpgroups each sees half of the columns.
__device__ __forceinline__ void find_largest(const Params& args, int row, int* largest) {
    int block = min(row / 128, args.scale_rows - 1), lane = threadIdx.x % 32;
    const unsigned char* from = args.scale + u64(block) * args.scale_columns * SCALE_BLOCK_BYTES +
                                lane * 16 + row % 128 / 64 * 8;
    u32 best[2][2] = {};
    constexpr int STEP = 4 * TURNS;
    for (int i = threadIdx.x % (128 * TURNS) / 32; i < args.scale_columns; i += STEP * AT_ONCE) {
        uint2 words[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int column = i + STEP * j;
            words[j] = make_uint2(0, 0);
            if (column < args.scale_columns)
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
    if (turn()) ring.next();
    for (int i = turn(); i < count; i += TURNS) {
        barrier_wait(at.full + 8 * ring.slot, ring.phase);
        advance(sums, a, at, rows, ring.slot, release, numbers);
        release = at.empty + 8 * ring.slot;
#pragma unroll
        for (int j = 0; j < TURNS; ++j) ring.next();
    }
    mma_wait<0>();
    // Keeps the compiler from using them before the wait.
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// What a warpgroup does: 64 rows of the result, for all tokens or half of them.
__device__ __forceinline__ void work(const Params& args, const Shared& at, int* largest,
                                     float* token_scale) {
    int worker = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    int group = TURNS == 1 ? worker : 0;
    int row = first_row() + 64 * group, channel = threadIdx.x % 128 / 32 * 16 + lane / 4;
    // What comes from memory is on its way together.
    float tensor = args.tensor_scale ? *args.tensor_scale : 1.0f;
    Rows rows;
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.bias[r] = load_bias(args, row + channel + 8 * r);
    largest += 64 * group;
    find_largest(args, row, largest);
    for (int i = threadIdx.x; i < TOKENS; i += 128 * WORKERS) {
        int token = min(first_token() + i, args.tokens - 1);
        copy_word(shared_address(token_scale + i), args.token_scale + token * args.token_step);
    }
    if (TURNS == 1)
        group_sync();
    else
        all_sync();
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
    // Beside the sums that the other warpgroup may still read.
    u32 staged = at.x + (TURNS == 1 ? 0 : TURNS * 4 * OWN_SUMS * 128);
    store(own, args, row, staged + worker * OWN_TOKENS * CHANNEL_BYTES);
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
    // Two warpgroups exchange theirs where the stages were.
    at.sums = TURNS > 1 ? at.x : at.scale + STAGES * SCALE_ROWS * SCALE_BYTES;
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
        if (PARTS > 1) barrier_expect(at.added, OWN_SUMS * 4 * 128 * WORKERS);
    }
    for (int i = threadIdx.x; i < ROWS; i += THREADS) largest[i] = 0;
    if (threadIdx.x == 128 * WORKERS) {
        prefetch_map(&x);
        prefetch_map(&w);
    }
    fetch_scales(args);
    __syncthreads();
    if (PARTS > 1) cluster_arrive();
    await_kernel_before();
    if (__shfl_sync(0xffffffff, threadIdx.x / 128, 0) == WORKERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW_REGISTERS));
        if (threadIdx.x == 128 * WORKERS) produce(args, &x, &w, at);
        if (PARTS > 1) cluster_wait();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY_REGISTERS));
        work(args, at, largest, token_scale);
    }
}
