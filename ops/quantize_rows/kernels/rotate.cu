// The rotation of 256 columns, on the tensor cores.
//
// The regular Hadamard matrix of width 256 multiplies each of four pairs of bits of a column's
// index by the 4-wide one, which is -1 where both bits of row and column differ. So it does not
// change when pairs change places, and a group of 256 columns may be seen as any 16 x 16 matrix X
// whose two indices, k and n, take two pairs each: what comes is H X H, with one H for both. Bits 0
// to 7 of a column are here
//
//     k0 k3 | n3 n0 | k1 k2 | n1 n2,   H[i][j] = (-1)^(d0 d3 + d1 d2), d = i xor j.
//
// X is the right operand of mma m16n8k16. There lane 4 g + t holds k in {2t, 2t+1, 2t+8, 2t+9} and
// n in {g, g+8}: bits k0, k3 and n3, which are 8 consecutive columns, 16 bytes. The product C = H X
// comes as rows {g, g+8} and columns {2t, 2t+1, 2t+8, 2t+9}, which is Cᵀ in the layout of a right
// operand. So H Cᵀ = (H X H)ᵀ follows at once, and each lane ends with the 8 columns it began with.
// H holds ±1, exact in every dtype; the 1/16 that makes the rotation orthonormal joins the scale.
//
// Between the products C is float32. PARTS is 1: the second reads 11 bits of each number (TF32),
// far below the rounding to 8 bits that follows. PARTS is 2: it reads two numbers in BF16, 16 bits.

// H as left operand: of X's dtype for the first product, of TF32 or BF16 for the second.
struct Hadamard {
    u32 wide[4], bf16[4], tf32[2][4];

    // Copies of a value differ by zeros that the compiler does not know: otherwise it keeps one,
    // and copies it into place for every product.
    __device__ __forceinline__ Hadamard(int lane, const u32 (&zeros)[3]) {
        const int g = lane >> 2, t = lane & 3;
        // Rows with the bit 3 of the column differ by d1 d2 alone, others by d0 too.
        const u32 same = ((g >> 1) ^ t) & ((g >> 2) ^ (t >> 1)) & 1, even = same ^ (g & 1);
        halves(wide, X == FP16 ? 0x3c00 : 0x3f80, same, even, zeros[0]);
        halves(bf16, 0x3f80, same, even, zeros[0]);
        // TF32 takes two steps, of columns 2t and 2t+1 and of these plus 8: any order of k will do.
        const u32 one = 0x3f800000, s = one | same << 31;
        const u32 e = one | even << 31, o = one | (even ^ 1) << 31;
        tf32[0][0] = s, tf32[0][1] = e, tf32[0][2] = s ^ zeros[0], tf32[0][3] = o;
        tf32[1][0] = e ^ zeros[0], tf32[1][1] = s ^ zeros[1];
        tf32[1][2] = o ^ zeros[0], tf32[1][3] = s ^ zeros[2];
    }
    __device__ __forceinline__ static void halves(u32 (&a)[4], u32 one, u32 same, u32 even,
                                                  u32 zero) {
        a[0] = one * 0x10001 | same * 0x80008000;
        a[1] = one * 0x10001 | even * 0x8000 | (even ^ 1) * 0x80000000;
        a[2] = a[1] ^ zero, a[3] = a[0] ^ zero;
    }
    // v = 16 times the rotated x, in the order of columns.
    __device__ __forceinline__ void rotate(const Vector<X>& x, float (&v)[WIDTH]) const {
        float c[2][4] = {}, d[2][4] = {};
        const uint4 p = x.part[0], q = x.part[X == FP32];
        if (X == FP32) {
            mma_tf32(c[0], tf32[0], __uint_as_float(p.x), __uint_as_float(p.y));
            mma_tf32(c[1], tf32[0], __uint_as_float(q.x), __uint_as_float(q.y));
            mma_tf32(c[0], tf32[1], __uint_as_float(p.z), __uint_as_float(p.w));
            mma_tf32(c[1], tf32[1], __uint_as_float(q.z), __uint_as_float(q.w));
        } else {
            mma<X>(c[0], wide, p.x, p.y);
            mma<X>(c[1], wide, p.z, p.w);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float* const a = c[0] + 2 * i;
            float* const b = c[1] + 2 * i;
            if (PARTS == 1) {
                mma_tf32(d[i], tf32[0], a[0], a[1]);
                mma_tf32(d[i], tf32[1], b[0], b[1]);
            } else {
                const u32 high_a = pack<BF16>(a[0], a[1]), high_b = pack<BF16>(b[0], b[1]);
                mma<BF16>(d[i], bf16, rest(high_a, a), rest(high_b, b));
                mma<BF16>(d[i], bf16, high_a, high_b);
            }
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v[i] = d[i >> 1 & 1][(i >> 2) * 2 + (i & 1)];
    }
    // What `pair` lacks of v.
    __device__ __forceinline__ static u32 rest(u32 pair, const float* v) {
        float low, high;
        unpack<BF16>(pair, low, high);
        return pack<BF16>(v[0] - low, v[1] - high);
    }
};
