// The pre-pass of attention, before the others: means of some keys, and of V of these. Sets counters
// and ranges to zero for the others. See tokens.cu.

__device__ __forceinline__ void store(float* to, const float (&v)[WIDTH]) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
}

extern "C" __global__ void __launch_bounds__(THREADS) survey(const __grid_constant__ Params p) {
    __shared__ float inverses[SURVEY_TOKENS];
    const Side<false> side(p);
    const u32 total = min(p.keys, SAMPLE), blocks = count_of(total, SURVEY_TOKENS);
    const int b = blockIdx.x / blocks, part = blockIdx.x % blocks;
    const u32 counters = Counters(p).end - p.done;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < counters; i += gridDim.x * THREADS)
        p.done[i] = 0;
    const u32 kv = V ? p.batches * p.kv_heads : 0;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < 2 * D * kv; i += gridDim.x * THREADS) {
        p.v_ends[i] = 0;
        if (i < kv) p.v_state[i] = 0;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % LANES;
    const float share = 1.0f / min(SURVEY_TOKENS, int(total) - part * SURVEY_TOKENS);
    if (NORM == TOKEN) {
        for (int t = warp; t < SURVEY_TOKENS; t += WARPS) {
            const u32 i = part * SURVEY_TOKENS + t;
            if (i >= total) break;
            const int token = sampled(i, total, p.keys);
            float sum = 0.0f;
#pragma unroll 5
            for (int n = threadIdx.x % 32; n < side.heads * LANES; n += 32) {
                Vector<X> x;
                float v[WIDTH];
                x.read(side.at(b, n / LANES, token, n % LANES), 0);
                x.floats(v);
                sum += squares_of(v);
            }
            sum = lanes_sum<1, 32>(sum);
            if (threadIdx.x % 32 == 0) inverses[t] = inverse_of(sum, side.heads * D, p.eps);
        }
        __syncthreads();
    }
    // All lanes of a warp together, as they exchange sums.
    for (int begin = warp * (32 / LANES); begin < side.heads; begin += ROWS) {
        const int mine = begin + threadIdx.x % 32 / LANES, h = min(mine, side.heads - 1);
        Vector<X> x[SURVEY_TOKENS];
        float sums[WIDTH] = {};
#pragma unroll
        for (int t = 0; t < SURVEY_TOKENS; ++t) {
            const u32 i = min(part * SURVEY_TOKENS + t, total - 1);
            x[t].read(side.at(b, h, sampled(i, total, p.keys), lane), 0);
        }
#pragma unroll
        for (int t = 0; t < SURVEY_TOKENS; ++t) {
            const u32 i = part * SURVEY_TOKENS + t;
            const int token = sampled(min(i, total - 1), total, p.keys);
            const long long at = (long long)token * ANGLE_ROW + lane * 4 * ANGLE_BYTES;
            float v[WIDTH], w[WIDTH];
            x[t].floats(v);
            if (Side<false>::WEIGHT >= 0) side.weights(w, h, token, p.first, lane);
            const float own = prepare<false>(v, w, p.cos + at, p.sin + at, p.eps);
            const float inverse = NORM == TOKEN ? inverses[t] : own;
#pragma unroll
            for (int n = 0; n < WIDTH; ++n)
                if (i < total) sums[n] = NORM ? fmaf(v[n], inverse, sums[n]) : sums[n] + v[n];
        }
        if (mine > h) continue;
        const long long to = ((long long)blockIdx.x * side.heads + h) * D + lane * WIDTH;
#pragma unroll
        for (int n = 0; n < WIDTH; ++n) sums[n] *= share;
        store(p.sample + to, sums);
        if (!V) continue;
#pragma unroll
        for (int t = 0; t < SURVEY_TOKENS; ++t) {
            const u32 i = min(part * SURVEY_TOKENS + t, total - 1);
            const long long token = sampled(i, total, p.keys);
            x[t].read(p.v + 2 * (b * p.v_b + h * p.v_h + token * p.v_l + lane * WIDTH), 0);
        }
        u32 high[4] = {LOWEST, LOWEST, LOWEST, LOWEST}, low[4] = {LOWEST, LOWEST, LOWEST, LOWEST};
#pragma unroll
        for (int n = 0; n < WIDTH; ++n) sums[n] = 0.0f;
#pragma unroll
        for (int t = 0; t < SURVEY_TOKENS; ++t) {
            const uint4 all = x[t].part[0];
            const u32 words[4] = {all.x, all.y, all.z, all.w};
            float v[WIDTH];
            x[t].floats(v);
#pragma unroll
            for (int n = 0; n < WIDTH; ++n)
                if (part * SURVEY_TOKENS + t < total) sums[n] += v[n];
            // The last token again, where there is none: no maximum sees it.
#pragma unroll
            for (int n = 0; n < 4; ++n)
                high[n] = most(high[n], words[n]), low[n] = most(low[n], words[n] ^ SIGNS);
        }
        if (V == E4M3) {
            const long long begin = ((long long)blockIdx.x * 2 * side.heads + h) * D + lane * WIDTH;
            float v[2][WIDTH];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                unpack<X>(high[n], v[0][2 * n], v[0][2 * n + 1]);
                unpack<X>(low[n], v[1][2 * n], v[1][2 * n + 1]);
            }
            store(p.v_sample_ends + begin, v[0]);
            store(p.v_sample_ends + begin + side.heads * D, v[1]);
        }
#pragma unroll
        for (int n = 0; n < WIDTH; ++n) sums[n] *= share;
        store(p.v_sample + to, sums);
    }
}
