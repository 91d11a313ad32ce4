// Instructions of Ampere and later, for kernels that NVRTC compiles for sm_80 and up: small
// products on the tensor cores, reductions in a warp, roundings of pairs.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

const u32 FULL_WARP = 0xffffffff;

// ---- dtypes of 16 bits, two in a register; the first is in its low half

enum Dtype { BF16 = 0, FP16 = 1, FP32 = 2 };

template <int DTYPE> __device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    if (DTYPE == BF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <int DTYPE> __device__ __forceinline__ void unpack(u32 pair, float& low, float& high) {
    if (DTYPE == BF16) {
        low = __uint_as_float(pair << 16);
        high = __uint_as_float(pair & 0xffff0000);
    } else {
        asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\n"
            "cvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n" : "=f"(low), "=f"(high) : "r"(pair));
    }
}

// ---- memory

// 16 bytes that no other block reads: they take no room in the L1 cache.
__device__ __forceinline__ uint4 load_once(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// 16 bytes that other blocks read too.
__device__ __forceinline__ uint4 load(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// 16 bytes from global to shared memory, meanwhile; no thread has them before it has waited.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const u32 at = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
// Ends a group of these copies. Then: until at most `later` groups, of 3, are on their way.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void await_groups(int later) {
    if (later >= 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
    else if (later == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
    else asm volatile("cp.async.wait_group 0;" ::: "memory");
}
// Until all that this thread copies is there, for this thread.
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- products of a warp: d += A · B, A [16, 16] or [16, 8], B [16, 8] or [8, 8]

template <int DTYPE>
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (DTYPE == BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// A [16, 8] in two registers, B [8, 8] in one.
template <int DTYPE>
__device__ __forceinline__ void mma_half(float (&d)[4], u32 a0, u32 a1, u32 b) {
    if (DTYPE == BF16)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
    else
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
}
// The tensor cores read 11 bits of a float32 mantissa, the first included.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const u32 (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// ---- reductions

// The larger magnitude, NaN where there is one.
__device__ __forceinline__ float larger(float a, float b) {
    float m;
    asm("{\n.reg .f32 c;\nabs.f32 c, %2;\nmax.NaN.f32 %0, %1, c;\n}\n" : "=f"(m) : "f"(a), "f"(b));
    return m;
}
__device__ __forceinline__ u32 warp_max(u32 value) {
    u32 m;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(m) : "r"(value));
    return m;
}
// The sum over lanes that differ in the bits from FIRST to below END.
template <int FIRST, int END> __device__ __forceinline__ float lanes_sum(float value) {
#pragma unroll
    for (int bit = FIRST; bit < END; bit <<= 1) value += __shfl_xor_sync(FULL_WARP, value, bit);
    return value;
}

// ---- the kernel after this one

// Once all blocks have come here, a kernel that was launched early is set up while they work; it
// waits for their end itself, before it touches memory. Nothing before Hopper.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- functions

__device__ __forceinline__ float tanh_approximate(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two values as E4M3, the first in the low byte; from sm_89 on.
__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
