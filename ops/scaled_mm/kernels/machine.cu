// The scaled product on Hopper: C = residual + gate · act(scale_a · scale_b · A·Bᵀ + H·Uᵀ + bias).
//
// One block of threads on each multiprocessor takes one tile of 128 x 256 after the other, in the
// order of order.cu. One warp copies 128 bytes of K of both operands to a ring of
// stages, and is ahead of the two warpgroups, of 64 rows each, that multiply: so the loads of a
// tile run behind the epilogue of the one before.
//
// The low-rank term is one more stage for each 64 ranks: H and U, of 16 bits, are as wide in bytes
// as A and B. It is multiplied onto the sums once they are floats and scaled. The residual comes by
// the same ring, two boxes of 128 rows and 128 bytes a stage.
//
// With DOWN, H = scale_a · scale_down · A·Downᵀ + shift is made here, too: the tiles of the first
// columns, "heads", multiply the A that stands in their stages with the 64 rows of Down as well.
// A head stores H and raises the flag of its rows, for which other tiles wait before they load it.
// Heads come so early in the order that these rarely wait. Nothing can wait for ever: a tile waits
// only for one that is earlier in the order, which a block has taken that is running.
//
// Layouts: rows of 128 bytes whose 16-byte chunks are XORed with the row's number modulo 8, as
// wgmma's 128-byte swizzle reads them. The rows of B and U are put in shared memory in such an
// order that the sums of a thread are of 8 neighbouring columns of C.
//
// Four files, compiled as one by NVRTC for sm_90a, after ops/cuda/hopper.cu: this one has the
// products, epilogue.cu what follows them, product.cu the kernel. Defined from outside:
//   INTEGER      A and B are INT8, else E4M3, or E5M2 where A_E5M2 and B_E5M2 say so
//   STAGES       of the ring
//   LOW_RANK     there is a term; FP16: H and U are fp16, not bf16
//   DOWN         H is made here
//   GROUP        rows of tiles that share columns in the L2 cache
//   ROWS_A, ROWS_B  a scale for each row of A, of B, else one for all
//   OUT          dtype of C, BIAS, GATE, RESIDUAL: of these; dtypes are as below
//   GATES        gate has more than one row
//   GELU         act is gelu (tanh)

#define NONE 0
#define BF16_TYPE 1
#define FP16_TYPE 2
#define FP32_TYPE 3

struct Params {
    const float* scale_a;  // [M] or one
    const float* scale_b;  // [N] or one
    const void* bias;      // [N]
    const void* gate;      // [M / gate_rows, N]
    void* out;             // [M, N], contiguous
    void* h;               // DOWN: [row tiles · 128, 64], written
    int* ready;            // DOWN: [row tiles], zeros: warpgroups that wrote their rows of h
    int* taken;            // DOWN: zero: tiles that were taken
    const float* scale_down;  // DOWN: [ranks]
    const float* shift;       // DOWN: [ranks], or null
    long long stride_gate;
    int m, n, steps, ranks, tiles, gate_rows;
    int ahead;             // DOWN: heads that come first
};

constexpr int M = 128;
constexpr int N = 256;
constexpr int ROW_BYTES = 128;
constexpr int RANKS = 64;
constexpr int CONSUMERS = 2;
constexpr int WARPS = CONSUMERS * 4;
constexpr int A_BYTES = M * ROW_BYTES;
constexpr int B_BYTES = N * ROW_BYTES;
constexpr int DOWN_BYTES = DOWN ? RANKS * ROW_BYTES : 0;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + DOWN_BYTES;
constexpr int bytes_of(int type) { return type == NONE ? 0 : type == FP32_TYPE ? 4 : 2; }
// Of a tile's columns: scales of B, biases, and the gate where it is one row.
constexpr int SCALE_BYTES = ROWS_B ? 4 : 0;
constexpr int BIAS_BYTES = bytes_of(BIAS);
constexpr int GATE_BYTES = GATES ? 0 : bytes_of(GATE);
constexpr int VECTOR_BYTES = SCALE_BYTES + BIAS_BYTES + GATE_BYTES;
constexpr int BIAS_AT = N * SCALE_BYTES;
constexpr int GATE_AT = BIAS_AT + N * BIAS_BYTES;
// Columns of a box of the residual, and boxes that a quarter of the epilogue reads.
constexpr int BOX_COLUMNS = RESIDUAL == FP32_TYPE ? 32 : 64;
constexpr int BOXES = 64 / BOX_COLUMNS;
// Where the warpgroups that multiply need more registers than the copying warp can spare without
// spilling a few itself.
constexpr bool TIGHT = DOWN && GATE;
constexpr int NO_TILE = -1;
constexpr int SUMS = 128;
constexpr int H_SUMS = 32;
// The epilogue has a quarter of the sums at a time: 64 columns.
constexpr int PART = 32;

#if INTEGER
typedef int Sum;
#else
typedef float Sum;
#endif

// ---- tensor cores

// Keeps the compiler from using registers before the wait that stands above.
template <int COUNT> __device__ __forceinline__ void settle(int (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
template <int COUNT> __device__ __forceinline__ void settle(float (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define FOUR(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define SIXTEEN(c, d, i) FOUR(c, d, i), FOUR(c, d, i + 4), FOUR(c, d, i + 8), FOUR(c, d, i + 12)
#define HALF_OF(c, d, i) \
    SIXTEEN(c, d, i), SIXTEEN(c, d, i + 16), SIXTEEN(c, d, i + 32), SIXTEEN(c, d, i + 48)
#define ALL(c, d) HALF_OF(c, d, 0), HALF_OF(c, d, 64)
#define FEW(c, d) SIXTEEN(c, d, 0), SIXTEEN(c, d, 16)
#define NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_128 NAMES_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127"
#if INTEGER
#define KIND "s32.s8.s8"
#define DOWN_KIND KIND
#define SIGNS ""
#define SUM_REGISTER "+r"
#else
#if A_E5M2
#define A_KIND "e5m2"
#else
#define A_KIND "e4m3"
#endif
#if B_E5M2
#define B_KIND "e5m2"
#else
#define B_KIND "e4m3"
#endif
#define KIND "f32." A_KIND "." B_KIND
#define DOWN_KIND "f32." A_KIND "." A_KIND
#define SIGNS ", 1, 1"
#define SUM_REGISTER "+f"
#endif
#if FP16
#define HALF "f16"
#else
#define HALF "bf16"
#endif

// d [64, 256] += a·bᵀ, 32 bytes of K.
__device__ __forceinline__ void mma(Sum (&d)[SUMS], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k32." KIND " {" NAMES_128 "}, %128, %129, p" SIGNS
        ";\n}\n" : ALL(SUM_REGISTER, d) : "l"(a), "l"(b), "r"(add));
}
// d [64, 64] += a·bᵀ, 32 bytes of K.
__device__ __forceinline__ void mma_down(Sum (&d)[H_SUMS], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32." DOWN_KIND " {" NAMES_32 "}, %32, %33, p" SIGNS
        ";\n}\n" : FEW(SUM_REGISTER, d) : "l"(a), "l"(b), "r"(add));
}
// d [64, 64] += a·bᵀ, 16 ranks.
__device__ __forceinline__ void mma_up(float (&d)[PART], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." HALF "." HALF
        " {" NAMES_32 "}, %32, %33, 1, 1, 1, 0, 0;\n" : FEW("+f", d) : "l"(a), "l"(b));
}

// ---- numbers

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ u32 pack_fp16(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <int TYPE> __device__ __forceinline__ u32 pack(float low, float high) {
    return TYPE == FP16_TYPE ? pack_fp16(low, high) : pack_bf16(low, high);
}
template <int TYPE> __device__ __forceinline__ void unpack(u32 both, float& low, float& high) {
    if (TYPE == FP16_TYPE) {
        asm("{\n.reg .b16 x, y;\nmov.b32 {x, y}, %2;\ncvt.f32.f16 %0, x;\ncvt.f32.f16 %1, y;\n}\n"
            : "=f"(low), "=f"(high) : "r"(both));
    } else {
        low = __uint_as_float(both << 16);
        high = __uint_as_float(both & 0xffff0000u);
    }
}
// Eight numbers from their bytes.
template <int TYPE> __device__ __forceinline__ void decode(float (&x)[8], const u32 (&bytes)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (TYPE == FP32_TYPE) x[i] = __uint_as_float(bytes[i]);
        else if (i % 2 == 0) unpack<TYPE>(bytes[i / 2], x[i], x[i + 1]);
    }
}
// Eight numbers of global memory from `index` on, a multiple of 8. Volatile, or the compiler would
// load early what it then has no registers for.
template <int TYPE>
__device__ __forceinline__ void load(float (&x)[8], const void* from, long long index) {
    constexpr int SIZE = bytes_of(TYPE);
    u32 bytes[8];
#pragma unroll
    for (int i = 0; i < SIZE / 2; ++i)
        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bytes[4 * i]), "=r"(bytes[4 * i + 1]), "=r"(bytes[4 * i + 2]),
                       "=r"(bytes[4 * i + 3])
                     : "l"(static_cast<const char*>(from) + index * SIZE + 16 * i));
    decode<TYPE>(x, bytes);
}
template <int TYPE>
__device__ __forceinline__ void store(void* to, long long index, const float (&x)[8]) {
    char* at = static_cast<char*>(to) + index * bytes_of(TYPE);
    if (TYPE == FP32_TYPE) {
        *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
        *reinterpret_cast<float4*>(at + 16) = make_float4(x[4], x[5], x[6], x[7]);
    } else {
        *reinterpret_cast<uint4*>(at) =
            make_uint4(pack<TYPE>(x[0], x[1]), pack<TYPE>(x[2], x[3]), pack<TYPE>(x[4], x[5]),
                       pack<TYPE>(x[6], x[7]));
    }
}
// Sixteen bytes, and eight numbers, of shared memory.
__device__ __forceinline__ void load_words(u32* to, u32 address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
template <int TYPE> __device__ __forceinline__ void load_shared(float (&x)[8], u32 address) {
    u32 bytes[8];
#pragma unroll
    for (int i = 0; i < (TYPE == FP32_TYPE ? 8 : 4); i += 4) load_words(bytes + i, address + 4 * i);
    decode<TYPE>(x, bytes);
}

// x · (1 + tanh(u)) / 2 as x / (1 + exp(-2u)): see `_gelu_tanh` of the Triton kernel.
__device__ __forceinline__ float gelu(float x) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;"
        : "=f"(e) : "f"(-x * (2.302208198144325f + 0.1029432395800235f * x * x)));
    return __fdividef(x, 1.0f + e);
}
