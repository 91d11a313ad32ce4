// What becomes of a tile's sums: the low-rank term, and all that follows. See machine.cu.

struct Shared {
    u32 stages, vectors, tiles;
    u32 full, empty, vectors_full, vectors_empty, tiles_full, tiles_empty;
};

// A place in the ring of stages.
typedef Slots<STAGES> Ring;

// A tile's row and column, in tiles.
struct Tile {
    int row, column;
    __device__ __forceinline__ Tile(int packed) : row(packed & 0xffff), column(packed >> 16) {}
    __device__ __forceinline__ bool is_head() const { return DOWN && column == 0; }
};

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

// The rows of h of a warpgroup as pairs of 16 bits: h[2 j + r] is of row r, its ranks are
// 8 j + 2 (lane % 4) and the next.
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

    // stage: of the residual's boxes, where there is one.
    template <int QUARTER>
    __device__ __forceinline__ void end(float (&value)[PART], u32 stage) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int offset = 64 * QUARTER + 32 * half + place.column, column = start + offset;
            if (column >= args.n) continue;
            float bias[8], gate[8], residual[8];
            u32 box = stage + (QUARTER * BOXES + half * BOXES / 2) % 2 * A_BYTES;
            if (BIAS) load_shared<BIAS>(bias, at.vectors + BIAS_AT + offset * BIAS_BYTES);
            if (GATE_BYTES) load_shared<GATE>(gate, at.vectors + GATE_AT + offset * GATE_BYTES);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int row = place.row + 8 * r;
                if (row >= args.m) continue;
                long long of_gate = GATES ? row / args.gate_rows * args.stride_gate + column : 0;
                if (GATES) load<GATE>(gate, args.gate, of_gate);
                if (RESIDUAL) load_residual(residual, box, offset, row % M);
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

    // Eight neighbours of a row, from the column `offset` of the tile on.
    __device__ __forceinline__ void load_residual(float (&x)[8], u32 box, int offset,
                                                  int row) const {
        constexpr int SIZE = bytes_of(RESIDUAL);
        u32 bytes[8];
#pragma unroll
        for (int i = 0; i < SIZE / 2; ++i) {
            u32 chunk = offset % BOX_COLUMNS * SIZE / 16 + i ^ row % 8;
            load_words(bytes + 4 * i, box + row * ROW_BYTES + chunk * 16);
        }
        decode<RESIDUAL>(x, bytes);
    }

    // residual: the ring, at the stage of this quarter, which moves on when it was read.
    template <int QUARTER>
    __device__ __forceinline__ void quarter(const Sum (&acc)[SUMS], const Ring& ring,
                                            Ring& residual) const {
        float value[PART];
        begin<QUARTER>(acc, value, ring);
        if (LOW_RANK) {
            mma_wait<0>();
            settle(value);
        }
        constexpr bool FIRST = RESIDUAL && (QUARTER * BOXES) % 2 == 0;
        constexpr bool LAST = RESIDUAL && ((QUARTER + 1) * BOXES) % 2 == 0;
        if (FIRST) barrier_wait(at.full + 8 * residual.slot, residual.phase);
        end<QUARTER>(value, at.stages + residual.slot * STAGE_BYTES);
        if (LAST) {
            __syncwarp();
            release(at.empty + 8 * residual.slot);
            residual.next();
        }
    }
};
