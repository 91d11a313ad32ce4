// The kernel: who copies, who multiplies, in which order. See machine.cu.

struct Maps {
    const TensorMap *a, *b, *h, *u, *down, *residual;
};

// ---- the warp that copies

__device__ __forceinline__ void await_rows(const int* ready) {
    int written;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(written) : "l"(ready) : "memory");
    } while (written < CONSUMERS);
    // Written by ordinary stores, read by a copy.
    asm volatile("fence.proxy.async;" ::: "memory");
}

__device__ __forceinline__ void copy_vectors(const Params& args, const Shared& at, int start) {
    u32 count = min(N, args.n - start);
    const char* bias = static_cast<const char*>(args.bias) + u64(start) * BIAS_BYTES;
    const char* gate = static_cast<const char*>(args.gate) + u64(start) * GATE_BYTES;
    barrier_expect(at.vectors_full, count * VECTOR_BYTES);
    if (ROWS_B) copy(at.vectors, args.scale_b + start, count * SCALE_BYTES, at.vectors_full);
    if (BIAS) copy(at.vectors + BIAS_AT, bias, count * BIAS_BYTES, at.vectors_full);
    if (GATE_BYTES) copy(at.vectors + GATE_AT, gate, count * GATE_BYTES, at.vectors_full);
}

__device__ __forceinline__ void copy_term(const Params& args, const Maps& maps, const Shared& at,
                                          Tile tile, Ring& ring) {
    for (int rank = 0; rank < args.ranks; rank += RANKS) {
        barrier_wait(at.empty + 8 * ring.slot, ring.phase ^ 1);
        u32 full = at.full + 8 * ring.slot, to = at.stages + ring.slot * STAGE_BYTES;
        barrier_expect(full, B_BYTES + (tile.is_head() ? 0 : A_BYTES));
        copy_box_5d(to + A_BYTES, maps.u, rank, tile.column * (N / 32), full);
        if (!tile.is_head()) {
            if (DOWN) await_rows(args.ready + tile.row);
            copy_box(to, maps.h, rank, tile.row * M, full);
        }
        ring.next();
    }
}

__device__ __forceinline__ void copy_residual(const Maps& maps, const Shared& at, Tile tile,
                                              Ring& ring) {
#pragma unroll 1
    for (int column = 0; column < N; column += 2 * BOX_COLUMNS) {
        barrier_wait(at.empty + 8 * ring.slot, ring.phase ^ 1);
        u32 full = at.full + 8 * ring.slot, to = at.stages + ring.slot * STAGE_BYTES;
        barrier_expect(full, 2 * A_BYTES);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            copy_box(to + i * A_BYTES, maps.residual, tile.column * N + column + i * BOX_COLUMNS,
                     tile.row * M, full);
        ring.next();
    }
}

// Tells the consumers which tile is next.
__device__ __forceinline__ void tell(const Shared& at, Slots<2>& told, int packed) {
    barrier_wait(at.tiles_empty + 8 * told.slot, told.phase ^ 1);
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(at.tiles + 4 * told.slot), "r"(packed) : "memory");
    barrier_arrive(at.tiles_full + 8 * told.slot);
    told.next();
}

// The tile at place t, or that there is none.
__device__ __forceinline__ int place(const Params& args, int t) {
    int rows = (args.m + M - 1) / M, columns = (args.n + N - 1) / N;
    return t < args.tiles ? tile_at(t, rows, columns, args.ahead) : NO_TILE;
}

__device__ __forceinline__ void produce(const Params& args, const Maps& maps, const Shared& at) {
    Ring ring;
    Slots<1> vectors;
    Slots<2> told;
    // With heads, a block takes the next tile when it runs and is free: they take longer, and what
    // others wait for may not be kept for a block that has found no multiprocessor yet.
    int t = DOWN ? atomicAdd(args.taken, 1) : blockIdx.x;
    for (;;) {
        int packed = place(args, t);
        tell(at, told, packed);
        if (packed == NO_TILE) return;
        Tile tile(packed);
        if (!DOWN) t += gridDim.x;
        // The answer takes a while.
        int ask = max(args.steps - 6, 0);
#pragma unroll 1
        for (int step = 0; step < args.steps; ++step) {
            if (DOWN && step == ask) t = atomicAdd(args.taken, 1);
            barrier_wait(at.empty + 8 * ring.slot, ring.phase ^ 1);
            u32 full = at.full + 8 * ring.slot, to = at.stages + ring.slot * STAGE_BYTES;
            barrier_expect(full, A_BYTES + B_BYTES + (tile.is_head() ? DOWN_BYTES : 0));
            copy_box(to, maps.a, step * ROW_BYTES, tile.row * M, full);
            copy_box_5d(to + A_BYTES, maps.b, step * ROW_BYTES, tile.column * (N / 32), full);
            if (tile.is_head())
                copy_box(to + A_BYTES + B_BYTES, maps.down, step * ROW_BYTES, 0, full);
            ring.next();
        }
        if (VECTOR_BYTES) {
            barrier_wait(at.vectors_empty, vectors.phase ^ 1);
            vectors.next();
            copy_vectors(args, at, tile.column * N);
        }
        if (LOW_RANK) copy_term(args, maps, at, tile, ring);
        if (RESIDUAL) copy_residual(maps, at, tile, ring);
    }
}

// ---- the warpgroups that multiply

// acc = A·Bᵀ of a tile; HEAD: h = A·Downᵀ, too.
template <bool HEAD>
__device__ __forceinline__ void multiply(const Params& args, const Shared& at, Ring& ring,
                                         Sum (&acc)[SUMS], Sum (&h)[H_SUMS]) {
    settle(acc);
    if (HEAD) settle(h);
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < args.steps; ++step) {
        barrier_wait(at.full + 8 * ring.slot, ring.phase);
        u32 stage = at.stages + ring.slot * STAGE_BYTES;
        u64 a = descriptor(stage + group_of() * (A_BYTES / CONSUMERS));
        u64 b = descriptor(stage + A_BYTES), down = descriptor(stage + A_BYTES + B_BYTES);
        mma_fence();
#pragma unroll
        for (int i = 0; i < ROW_BYTES / 32; ++i) {
            mma(acc, a + 2 * i, b + 2 * i, step | i);
            if (HEAD) mma_down(h, a + 2 * i, down + 2 * i, step | i);
        }
        mma_commit();
        mma_wait<1>();
        if (step) release(at.empty + 8 * before);
        before = ring.slot;
        ring.next();
    }
    mma_wait<0>();
    settle(acc);
    if (HEAD) settle(h);
    release(at.empty + 8 * before);
}

// Waits for the stages that hold H and U, the first of which is returned.
__device__ __forceinline__ Ring await_term(const Params& args, const Shared& at, Ring& ring) {
    Ring first = ring;
#pragma unroll 1
    for (int rank = 0; rank < args.ranks; rank += RANKS) {
        barrier_wait(at.full + 8 * ring.slot, ring.phase);
        ring.next();
    }
    return first;
}
__device__ __forceinline__ void release_term(const Params& args, const Shared& at, Ring ring) {
    for (int rank = 0; rank < args.ranks; rank += RANKS) {
        release(at.empty + 8 * ring.slot);
        ring.next();
    }
}

__device__ __forceinline__ void consume(const Params& args, const Shared& at) {
    Ring ring;
    Slots<1> vectors;
    Slots<2> told;
    float scale_b = ROWS_B ? 0.0f : *args.scale_b;
    for (;;) {
        int packed;
        barrier_wait(at.tiles_full + 8 * told.slot, told.phase);
        asm volatile("ld.shared.s32 %0, [%1];"
                     : "=r"(packed) : "r"(at.tiles + 4 * told.slot) : "memory");
        __syncwarp();
        release(at.tiles_empty + 8 * told.slot);
        told.next();
        if (packed == NO_TILE) return;
        Tile tile(packed);
        Place place;
        place.row = tile.row * M + group_of() * 64;
        place.row += threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        place.column = threadIdx.x % 4 * 8;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = place.row + 8 * r;
            place.scale[r] = row < args.m ? args.scale_a[ROWS_A ? row : 0] : 0.0f;
        }
        Sum acc[SUMS];
        Sum sums[H_SUMS];
        bool head = __shfl_sync(0xffffffff, tile.is_head(), 0);
        if (DOWN && head) {
            multiply<true>(args, at, ring, acc, sums);
            u32 h[H_SUMS / 2];
            finish_h(args, place, sums, h);
            publish_h(args, place, tile.row, h);
            barrier_wait(at.full + 8 * ring.slot, ring.phase);
            place_h(at.stages + ring.slot * STAGE_BYTES + group_of() * (A_BYTES / CONSUMERS), h);
        } else {
            multiply<false>(args, at, ring, acc, sums);
        }
        if (VECTOR_BYTES) barrier_wait(at.vectors_full, vectors.phase);
        vectors.next();
        Ring term;
        if (LOW_RANK) term = await_term(args, at, ring);
        Epilogue epilogue = {args, at, place, tile.column * N, scale_b};
        epilogue.quarter<0>(acc, term, ring);
        epilogue.quarter<1>(acc, term, ring);
        epilogue.quarter<2>(acc, term, ring);
        epilogue.quarter<3>(acc, term, ring);
        if (LOW_RANK) release_term(args, at, term);
        if (VECTOR_BYTES) {
            __syncwarp();
            release(at.vectors_empty);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
scaled_mm(const __grid_constant__ Params args, const __grid_constant__ TensorMap a,
          const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap h,
          const __grid_constant__ TensorMap u, const __grid_constant__ TensorMap down,
          const __grid_constant__ TensorMap residual) {
    extern __shared__ __align__(1024) char raw[];
    Shared at;
    at.stages = shared_address(raw);
    at.vectors = at.stages + STAGES * STAGE_BYTES;
    at.tiles = at.vectors + N * VECTOR_BYTES;
    at.full = at.tiles + 8;
    at.empty = at.full + 8 * STAGES;
    at.vectors_full = at.empty + 8 * STAGES;
    at.vectors_empty = at.vectors_full + 8;
    at.tiles_full = at.vectors_empty + 8;
    at.tiles_empty = at.tiles_full + 16;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(at.full + 8 * i, 1);
            barrier_init(at.empty + 8 * i, WARPS);
        }
        barrier_init(at.vectors_full, 1);
        barrier_init(at.vectors_empty, WARPS);
        for (int i = 0; i < 2; ++i) {
            barrier_init(at.tiles_full + 8 * i, 1);
            barrier_init(at.tiles_empty + 8 * i, WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    // Until here the kernel before in the stream may still run, and read what this one writes.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (group == CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(TIGHT ? 24 : 40));
        Maps maps = {&a, &b, &h, &u, &down, &residual};
        if (threadIdx.x == CONSUMERS * 128) produce(args, maps, at);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(TIGHT ? 240 : 232));
        consume(args, at);
    }
}
