// Hopper's own instructions, for kernels that NVRTC compiles for sm_90a: barriers in shared memory,
// copies that arrive there by themselves, and what stands around asynchronous products.

typedef unsigned int u32;
typedef unsigned long long u64;

struct __align__(64) TensorMap { char bytes[128]; };

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- barriers and copies

__device__ __forceinline__ void barrier_init(u32 bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 phase) {
    asm volatile(
        "{\n.reg .pred p;\nAGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE;\nbra AGAIN;\nDONE:\n}\n" ::"r"(bar), "r"(phase) : "memory");
}
// The same for what another block of the cluster sends.
__device__ __forceinline__ void barrier_wait_for_cluster(u32 bar, u32 phase) {
    asm volatile(
        "{\n.reg .pred p;\nAGAIN:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE;\nbra AGAIN;\nDONE:\n}\n" ::"r"(bar), "r"(phase) : "memory");
}
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
__device__ __forceinline__ void copy(u32 to, const void* from, u32 bytes, u32 bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int d, int l, int h, int b,
                                         u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %4, %5}], [%6];"
        ::"r"(to), "l"(map), "r"(d), "r"(l), "r"(h), "r"(b), "r"(bar) : "memory");
}
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int row,
                                         u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(bar) : "memory");
}
// A word that a thread copies by itself; it waits for all its words.
__device__ __forceinline__ void copy_word(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void await_words() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// A line into the L2 cache, which sees all writes: only time depends on it, so that it may be asked
// for before `await_kernel_before`.
constexpr int LINE_BYTES = 128;
__device__ __forceinline__ void prefetch_line(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}
// Of the GPU, as it numbers them.
__device__ __forceinline__ u32 processors() {
    u32 count;
    asm("mov.u32 %0, %%nsmid;" : "=r"(count));
    return count;
}
// Until the kernel before it in the stream has ended, a grid that was launched early may touch no
// memory.
__device__ __forceinline__ void await_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
// A box of five dimensions, whole in the three between the first and the last.
__device__ __forceinline__ void copy_box_5d(u32 to, const TensorMap* map, int x, int y, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3, %3, %3, %4}], [%5];"
        ::"r"(to), "l"(map), "r"(x), "r"(0), "r"(y), "r"(bar) : "memory");
}

// ---- clusters of blocks

__device__ __forceinline__ u32 block_in_cluster() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Waits for all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
// The same in two steps, after which the barriers of all blocks stand; of other memory it says
// nothing. Every thread takes both.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait;" ::: "memory");
}
// The address of what stands at the same place in another block.
__device__ __forceinline__ u32 address_in_block(u32 here, u32 block) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
    return there;
}
// Sixteen bytes to another block, whose barrier counts them.
__device__ __forceinline__ void send(u32 there, const float (&four)[4], u32 bar_there) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
        ::"r"(there), "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]), "r"(bar_there)
        : "memory");
}
// Arrives at the barrier that stands at the same place in another block.
__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 block) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(bar), "r"(block) : "memory");
}
// `copy` and `copy_box` to the same place in each of the cluster's blocks, at each one's barrier.
template <int BLOCKS>
__device__ __forceinline__ void copy_to_all(u32 to, const void* from, u32 bytes, u32 bar) {
    if constexpr (BLOCKS == 1) {
        copy(to, from, bytes, bar);
    } else {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1], %2, [%3], %4;"
            ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "h"((unsigned short)((1 << BLOCKS) - 1))
            : "memory");
    }
}
template <int BLOCKS>
__device__ __forceinline__ void copy_box_to_all(u32 to, const TensorMap* map, int d, int l, int h,
                                                int b, u32 bar) {
    if constexpr (BLOCKS == 1) {
        copy_box(to, map, d, l, h, b, bar);
    } else {
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
            ::"r"(to), "l"(map), "r"(d), "r"(l), "r"(h), "r"(b), "r"(bar),
              "h"((unsigned short)((1 << BLOCKS) - 1)) : "memory");
    }
}

// ---- tensor cores

// Descriptor of an operand in 128-byte swizzled rows; groups of 8 rows are 1024 bytes apart.
// leading: bytes between groups of 64 columns of a 16-bit operand that is not K-major.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading = 16) {
    return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(leading >> 4) << 16) |
           ((address & 0x3FFFF) >> 4);
}
__device__ __forceinline__ void mma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void mma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
