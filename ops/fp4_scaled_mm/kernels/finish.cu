// What follows the products: sums that are added up, scaled and stored.

// own = the sums of the own tokens, with those of the other block of the cluster, or of the other
// warpgroup, of which a thread has the same as the one of its number here.
__device__ __forceinline__ void add_up(float (&own)[OWN_SUMS], const float (&sums)[SUMS],
                                       const Shared& at) {
    if constexpr (SHARES == 1) {
#pragma unroll
        for (int i = 0; i < OWN_SUMS; ++i) own[i] = sums[i];
    } else {
        constexpr int STEP = 16 * 128 * WORKERS;
        bool second = part() + turn() == 1;
        u32 here = at.sums + threadIdx.x * 16, other = blockIdx.z ^ 1;
        u32 there = at.sums + (threadIdx.x ^ 128) * 16, added = 0;
        if (PARTS > 1) {
            there = address_in_block(here, other), added = address_in_block(at.added, other);
            // The other one runs.
            cluster_wait();
        }
#pragma unroll
        for (int i = 0; i < OWN_SUMS; i += 4) {
            float sent[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sent[j] = second ? sums[i + j] : sums[OWN_SUMS + i + j];
                own[i + j] = second ? sums[OWN_SUMS + i + j] : sums[i + j];
            }
            if (PARTS > 1)
                send(there + i / 4 * STEP, sent, added);
            else
                asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                             ::"r"(there + i / 4 * STEP), "f"(sent[0]), "f"(sent[1]), "f"(sent[2]),
                               "f"(sent[3]) : "memory");
        }
        if (PARTS > 1)
            barrier_wait_for_cluster(at.added, 0);
        else
            all_sync();
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
