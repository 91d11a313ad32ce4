// The kernel: who copies, who multiplies, in which order. See machine.cu.

struct Maps {
    const TensorMap *a, *b, *h, *u, *down;
};

struct Shared {
    u32 stages, vectors, tiles;
    u32 full, empty, vectors_full, vectors_empty, tiles_full, tiles_empty;
};

// A place in a ring of so many slots.
template <int COUNT> struct Slots {
    int slot = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++slot == COUNT) {
            slot = 0;
            phase ^= 1;
        }
    }
};
typedef Slots<STAGES> Ring;

// A tile's row and column, in tiles.
struct Tile {
    int row, column;
    __device__ __forceinline__ Tile(int packed) : row(packed & 0xffff), column(packed >> 16) {}
    __device__ __forceinline__ bool is_head() const { return DOWN && column == 0; }
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
    barrier_expect(at.vectors_full, count * ((ROWS_B ? 4 : 0) + (BIAS ? BIAS_BYTES : 0)));
    if (ROWS_B) copy(at.vectors, args.scale_b + start, count * 4, at.vectors_full);
    if (BIAS) {
        const char* bias = static_cast<const char*>(args.bias) + u64(start) * BIAS_BYTES;
        copy(at.vectors + N * 4, bias, count * BIAS_BYTES, at.vectors_full);
    }
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

// Tells the consumers which tile is next.
__device__ __forceinline__ void tell(const Shared& at, Slots<2>& told, int packed) {
    barrier_wait(at.tiles_empty + 8 * told.slot, told.phase ^ 1);
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(at.tiles + 4 * told.slot), "r"(packed) : "memory");
    barrier_arrive(at.tiles_full + 8 * told.slot);
    told.next();
}

__device__ __forceinline__ void produce(const Params& args, const Maps& maps, const Shared& at) {
    Ring ring;
    Slots<1> vectors;
    Slots<2> told;
    int t = blockIdx.x;
    int packed = args.order[t];
    for (;;) {
        tell(at, told, packed);
        if (packed == NO_TILE) return;
        Tile tile(packed);
        // Heads take longer: with them, who is free first takes the next tile. Asked for early, as
        // the answer takes a while.
        if (!DOWN) t += gridDim.x;
        int ask = max(args.steps - 6, 0), look = max(args.steps - 3, 0);
#pragma unroll 1
        for (int step = 0; step < args.steps; ++step) {
            if (DOWN && step == ask) t = gridDim.x + atomicAdd(args.taken, 1);
            if (step == look) packed = t < args.tiles ? args.order[t] : NO_TILE;
            barrier_wait(at.empty + 8 * ring.slot, ring.phase ^ 1);
            u32 full = at.full + 8 * ring.slot, to = at.stages + ring.slot * STAGE_BYTES;
            barrier_expect(full, A_BYTES + B_BYTES + (tile.is_head() ? DOWN_BYTES : 0));
            copy_box(to, maps.a, step * ROW_BYTES, tile.row * M, full);
            copy_box_5d(to + A_BYTES, maps.b, step * ROW_BYTES, tile.column * (N / 32), full);
            if (tile.is_head())
                copy_box(to + A_BYTES + B_BYTES, maps.down, step * ROW_BYTES, 0, full);
            ring.next();
        }
        if (VECTORS) {
            barrier_wait(at.vectors_empty, vectors.phase ^ 1);
            vectors.next();
            copy_vectors(args, at, tile.column * N);
        }
        if (LOW_RANK) copy_term(args, maps, at, tile, ring);
    }
}

// ---- the warpgroups that multiply

// What a thread knows of a tile: its two rows, 8 apart, their scales, its column in each 32.
struct Place {
    int row, column;
    float scale[2];
};

__device__ __forceinline__ int group_of() { return threadIdx.x / 128; }
__device__ __forceinline__ void group_sync() {
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group_of()) : "memory");
}
__device__ __forceinline__ void release(u32 barrier) {
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

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

// The rows of h of a warpgroup as pairs of 16 bits: h[2 j + r] is of row r, ranks 8 j + 2 (lane % 4).
__device__ __forceinline__ void finish_h(const Params& args, const Place& place,
                                         const Sum (&sums)[H_SUMS], u32 (&h)[H_SUMS / 2]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        int rank = 8 * j + 2 * (threadIdx.x % 4);
        float scale[2] = {0.0f, 0.0f}, shift[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (rank + i >= args.ranks) continue;
            scale[i] = args.scale_down[rank + i];
            if (args.shift) shift[i] = args.shift[rank + i];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float x = float(sums[4 * j + 2 * r]) * place.scale[r] * scale[0] + shift[0];
            float y = float(sums[4 * j + 2 * r + 1]) * place.scale[r] * scale[1] + shift[1];
            h[2 * j + r] = pack<FP16 ? FP16_TYPE : BF16_TYPE>(x, y);
        }
    }
}
__device__ __forceinline__ void publish_h(const Params& args, const Place& place, int tile_row,
                                          const u32 (&h)[H_SUMS / 2]) {
    u32* to = static_cast<u32*>(args.h) + u64(place.row) * (RANKS / 2) + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < H_SUMS / 2; ++i) to[i % 2 * 8 * (RANKS / 2) + i / 2 * 4] = h[i];
    __threadfence();
    asm volatile("fence.proxy.async;" ::: "memory");
    group_sync();
    if (threadIdx.x % 128 == 0)
        asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(args.ready + tile_row)
                     : "memory");
}
// To a stage, as if it had been copied there.
__device__ __forceinline__ void place_h(u32 address, const u32 (&h)[H_SUMS / 2]) {
    u32 row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < H_SUMS / 2; ++i) {
        u32 at = address + (row + i % 2 * 8) * ROW_BYTES + (i / 2 ^ row % 8) * 16;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + threadIdx.x % 4 * 4), "r"(h[i])
                     : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    group_sync();
}

// What the sums of a tile become: 64 columns at a time, of which a thread has twice 8 neighbours.
struct Epilogue {
    const Params& args;
    const Shared& at;
    const Place& place;
    int start;      // first column of the tile
    float scale_b;  // where it is one

    // value = scale_a · scale_b · acc + H·Uᵀ of a quarter; the second product is under way after it.
    template <int QUARTER>
    __device__ __forceinline__ void begin(const Sum (&acc)[SUMS], float (&value)[PART],
                                          Ring ring) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int column = 64 * QUARTER + 32 * half + place.column;
            float of_b[8];
            if (ROWS_B) load_shared<FP32_TYPE>(of_b, at.vectors + column * 4);
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float x = float(acc[PART * QUARTER + 16 * half + i]) * place.scale[i / 2 % 2];
                value[16 * half + i] = x * (ROWS_B ? of_b[i / 4 * 2 + i % 2] : scale_b);
            }
        }
        if (!LOW_RANK) return;
        settle(value);
        mma_fence();
#pragma unroll 1
        for (int rank = 0; rank < (DOWN ? RANKS : args.ranks); rank += RANKS) {
            u32 stage = at.stages + ring.slot * STAGE_BYTES;
            u64 h = descriptor(stage + group_of() * (A_BYTES / CONSUMERS));
            u64 u = descriptor(stage + A_BYTES + QUARTER * 64 * ROW_BYTES);
#pragma unroll
            for (int i = 0; i < RANKS / 16; ++i) mma_up(value, h + 2 * i, u + 2 * i);
            ring.next();
        }
        mma_commit();
    }

    template <int QUARTER>
    __device__ __forceinline__ void end(float (&value)[PART]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int offset = 64 * QUARTER + 32 * half + place.column, column = start + offset;
            if (column >= args.n) continue;
            float bias[8], gate[8], residual[8];
            if (BIAS) load_shared<BIAS>(bias, at.vectors + N * 4 + offset * BIAS_BYTES);
            if (GATE && !GATES) load<GATE>(gate, args.gate, column);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int row = place.row + 8 * r;
                if (row >= args.m) continue;
                if (GATES) load<GATE>(gate, args.gate, row / args.gate_rows * args.stride_gate + column);
                if (RESIDUAL) load<RESIDUAL>(residual, args.residual, row * args.stride_residual + column);
                float x[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    x[i] = value[16 * half + i / 2 * 4 + 2 * r + i % 2];
                    if (BIAS) x[i] += bias[i];
                    if (GELU) x[i] = gelu(x[i]);
                    if (GATE) x[i] *= gate[i];
                    if (RESIDUAL) x[i] += residual[i];
                }
                store<OUT>(args.out, static_cast<long long>(row) * args.n + column, x);
            }
        }
    }

    template <int QUARTER>
    __device__ __forceinline__ void quarter(const Sum (&acc)[SUMS], const Ring& ring) const {
        float value[PART];
        begin<QUARTER>(acc, value, ring);
        if (LOW_RANK) {
            mma_wait<0>();
            settle(value);
        }
        end<QUARTER>(value);
    }
};

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
        place.row = tile.row * M + group_of() * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        place.column = threadIdx.x % 4 * 8;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int row = ROWS_A ? place.row + 8 * r : 0;
            place.scale[r] = row < args.m ? args.scale_a[row] : 0.0f;
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
        if (VECTORS) barrier_wait(at.vectors_full, vectors.phase);
        vectors.next();
        Ring term;
        if (LOW_RANK) term = await_term(args, at, ring);
        Epilogue epilogue = {args, at, place, tile.column * N, scale_b};
        epilogue.quarter<0>(acc, term);
        epilogue.quarter<1>(acc, term);
        epilogue.quarter<2>(acc, term);
        epilogue.quarter<3>(acc, term);
        if (LOW_RANK) release_term(args, at, term);
        if (VECTORS) {
            __syncwarp();
            release(at.vectors_empty);
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
product(const __grid_constant__ Params args, const __grid_constant__ TensorMap a,
        const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap h,
        const __grid_constant__ TensorMap u, const __grid_constant__ TensorMap down) {
    extern __shared__ __align__(1024) char raw[];
    Shared at;
    at.stages = shared_address(raw);
    at.vectors = at.stages + STAGES * STAGE_BYTES;
    at.tiles = at.vectors + N * 8;
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
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == CONSUMERS * 128) produce(args, Maps{&a, &b, &h, &u, &down}, at);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(args, at);
    }
}
