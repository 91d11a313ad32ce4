// Attention on Hopper: INT8 Q·Kᵀ, then P·V in 16 bits, FP8, or unsigned times signed 8 bits.
//
// A block of threads owns 128 rows of Q, and all keys or a part of them. One warp copies tiles of K
// and V to shared memory; two warpgroups of 64 rows each multiply and take the softmax, so that one
// has the tensor cores while the other computes exponentials. Within a warpgroup, P·V of a tile runs
// beside the softmax of the next one.
//
// Layouts (ops/layout, and its tests): rows of 128 bytes whose 16-byte chunks are XORed with the
// row's number modulo 8, as wgmma's 128-byte swizzle reads them. 8-bit V is stored transposed, its
// keys in the order in which a thread holds P, so that P goes from accumulator to operand without
// a shuffle.
//
// Three files, compiled as one by NVRTC for sm_90a, after ops/cuda/hopper.cu: this one has the
// products, softmax.cu the arithmetic of a tile, attend.cu the kernel. Defined from outside:
//   PV              one of the three below
//   FP16            inputs and output are fp16, not bf16
//   STAGES          tiles of K and of V in shared memory
//   PINGPONG        the warpgroups take turns at the tensor cores
//   DOUBLE          P is packed while the one before is multiplied, at the price of registers
//   PACED           exponentials are taken in eights, each after the eight before
//   Q_IN_REGISTERS  Q is read from shared memory once
//   CLUSTER         blocks of threads that share copies of K and V
//   TILES_SUMMED    tiles of FP8 P·V that the tensor cores sum by themselves
//   CAUSAL          a row sees the keys up to its own index
//   BIASED          a number for each key is added to its logits, or hides it
//   PARTIAL         numbers that a block leaves to another where they share the keys of rows

#if CAUSAL && BIASED
#error "not both"
#endif
#define PV_EXACT 0
#define PV_FP8 1
#define PV_INT8 2

// A divisor as the host prepares it: a quotient is a product's upper half, for x below 2^31.
struct Divisor {
    u32 divisor, multiplier, shift;
    __device__ __forceinline__ u32 divide(u32 x, u32& rest) const {
        u32 quotient = divisor == 1 ? x : __umulhi(x, multiplier) >> shift;
        rest = x - quotient * divisor;
        return quotient;
    }
};
struct Params {
    const char* q;         // [B·H, tiles, 128, 128] int8, swizzled
    const char* k;         // [B·Hkv, blocks, 128, 128] int8, swizzled
    const char* v;         // [B·Hkv, blocks, 128 of D, 128 keys], 8-bit, swizzled; unused if exact
    const float* q_scale;  // [B·H, tiles · 128], with the softmax scale and log2(e)
    const float* k_scale;  // [B·Hkv, blocks, 4]: of keys whose (key % 8) / 2 is the index
    const float* v_scale;  // [B·Hkv, 128]; unused if exact
    const float* v_offset;   // [B·Hkv, 128], added after the sum; unused if exact
    const float* q_bound;  // [B·H, tiles · 128]: norm of the row, scaled
    const float* k_bound;  // [B·Hkv, blocks]: largest norm of a key, scaled
    void* out;             // rows of 128, at multiples of 16 bytes
    float* lse;            // [B·H, Lq] natural logarithm, or null
    long long out_b, out_h, out_l;
    int rows, keys, tiles, blocks;
    u32 whole;             // clusters whose blocks have all keys of their rows
    Divisor parts;         // blocks that share the keys of a tile of the rows after these
    Divisor units;         // clusters of a head
    Divisor heads;         // of Q
    Divisor group;         // heads of Q for one of K
    float* partial;        // [tiles of shared keys, parts, PARTIAL]: what each block has
    u32* done;             // [tiles of shared keys]: blocks that have left it there, at first 0
    const float* bias;     // [blocks, 132]: of 128 keys, in log2 units; then 0 if all of them are
                           // 0, NaN if any is
    long long bias_b, bias_h;
};

constexpr int M = 128;
constexpr int N = 128;
constexpr int D = 128;
constexpr int K_BYTES = N * D;
constexpr int V_BYTES = N * D * (PV == PV_EXACT ? 2 : 1);
// FP8: behind V's channels stand eight more. The first is all ones: its P·V is the sum of P.
constexpr int ONES_BYTES = PV == PV_FP8 ? 8 * N : 0;
constexpr int V_STRIDE = V_BYTES + ONES_BYTES;
// Numbers of a thread's part of P·V.
constexpr int SUMS = PV == PV_FP8 ? 68 : 64;
constexpr int Q_BYTES = M * D;
constexpr int CONSUMERS = 2;
constexpr int WARPS = CONSUMERS * 4;
static_assert(PARTIAL == (64 + 4) * CONSUMERS * 128, "P·V, P's sums and tops of a thread's rows");
// Rows' maxima start where FP8 keeps the most: 2^5, of at most 448.
constexpr float SHIFT = PV == PV_FP8 ? 5.0f : 0.0f;
// log2 of how far P may grow beyond the maximum it is scaled by before all is rescaled.
constexpr float LIMIT = PV == PV_FP8 ? 8.75f : (PV == PV_EXACT && FP16) ? 8.0f : 60.0f;
// Without a running maximum P stays below this power of two.
constexpr float SAFE = 90.0f;
constexpr float LOG2_255 = 7.994353436858858f;
// log2 of what the largest P of a row in a tile becomes: INT8's code 255 times the least FP16.
constexpr float CODE = PV == PV_INT8 ? LOG2_255 - 24.0f : 0.0f;
// INT8's sums begin at the bits of this float, 1.5 · 2^23: while they move by less than 2^22, their
// bits are the float BEGIN + sum. They do while a thread's codes, a quarter of a row's, add up to
// MOST_CODES at most, as V's are 127 at most.
constexpr float BEGIN = 12582912.0f;
constexpr u32 MOST_CODES = ((1 << 22) - 1) / (4 * 127);
static_assert(N / 4 * 255 <= MOST_CODES, "one tile's sums must fit");
// Logits up to this many log2 units lose nothing to speak of when their rows' top is rounded.
constexpr float NEARBY = 1 << 20;
constexpr int EMPTY = 0x80000000;
// Elements of a tile of `bias`: a copy is a multiple of 16 bytes.
constexpr int BIASES = N + 4;
constexpr int BIAS_BYTES = BIASED ? BIASES * 4 : 0;
// The maximum of a row of which every key is hidden so far.
constexpr float FLOOR = -1e30f;

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void named_sync(int id) {
    asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory");
}
__device__ __forceinline__ void named_arrive(int id) {
    asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory");
}
__device__ __forceinline__ void all_consumers() { named_sync(5); }
// Whether a condition holds for all 128 threads of a warpgroup.
__device__ __forceinline__ bool all_of_group(int id, bool condition) {
    int result;
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\nbar.red.and.pred q, %2, 128, p;\n"
        "selp.b32 %0, 1, 0, q;\n}\n" : "=r"(result) : "r"((int)condition), "r"(id) : "memory");
    return result;
}

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
#define ALL(c, d) SIXTEEN(c, d, 0), SIXTEEN(c, d, 16), SIXTEEN(c, d, 32), SIXTEEN(c, d, 48)
#define INTS(d) ALL("+r", d)
#define FLOATS(d) ALL("+f", d)
#if FP16
#define HALF "f16"
#else
#define HALF "bf16"
#endif

#if Q_IN_REGISTERS
__device__ __forceinline__ void mma_s8(int (&d)[64], const u32* a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p;\n}\n"
        : INTS(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#else
__device__ __forceinline__ void mma_s8(int (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p;\n}\n"
        : INTS(d)
        : "l"(a), "l"(b), "r"(add));
}
#endif

#if PV == PV_EXACT
__device__ __forceinline__ void mma_p(float (&d)[64], const u32* a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." HALF "." HALF " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
        : FLOATS(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#elif PV == PV_FP8
__device__ __forceinline__ void mma_p(float (&d)[SUMS], const u32* a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %73, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67}, {%68, %69, %70, %71}, %72, p, 1, 1;\n}\n"
        : FLOATS(d), FOUR("+f", d, 64)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#else
__device__ __forceinline__ void mma_p(int (&d)[64], const u32* a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p;\n}\n"
        : INTS(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#endif
