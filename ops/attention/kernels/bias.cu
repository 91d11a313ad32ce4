// A mask of keys as the kernel for Hopper reads it: see `bias_of` in hopper.py, which sets, after
// ampere.cu:
//   MASK   dtype of the mask: BF16, FP16, FP32, or BOOL, where a key counts
//   TILE   keys of a tile, which a block of so many threads has
//   MORE   numbers after those of the keys

const int BOOL = 3;
const float LOG2E = 1.4426950408889634f;

struct Params {
    const char* mask;
    float* bias;
    long long mask_b, mask_h, mask_l;
    int heads, keys, blocks;
};

// What a logit gains in log2 units.
__device__ __forceinline__ float bias_at(const char* mask, long long at) {
    if (MASK == BOOL) return mask[at] ? 0.0f : __int_as_float(0xff800000);
    float value, none;
    if (MASK == FP32)
        value = reinterpret_cast<const float*>(mask)[at];
    else
        unpack<MASK>(reinterpret_cast<const unsigned short*>(mask)[at], value, none);
    return value * LOG2E;
}

extern "C" __global__ void __launch_bounds__(TILE) bias_of_mask(const __grid_constant__ Params p) {
    const int bh = blockIdx.x / p.blocks, key = blockIdx.x % p.blocks * TILE + threadIdx.x;
    const long long first = bh / p.heads * p.mask_b + bh % p.heads * p.mask_h;
    const float bias = key < p.keys ? bias_at(p.mask, first + key * p.mask_l)
                                    : __int_as_float(0xff800000);
    float* const to = p.bias + (long long)blockIdx.x * (TILE + MORE);
    to[threadIdx.x] = bias;
    // NaN is not zero either.
    const bool some = __syncthreads_or(bias != 0.0f), bad = __syncthreads_or(bias != bias);
    if (threadIdx.x < MORE)
        to[TILE + threadIdx.x] = bad ? __int_as_float(0x7fffffff) : some ? 1.0f : 0.0f;
}
