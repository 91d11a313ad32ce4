// 4-bit weights to E4M3 in registers, as the left operand of the tensor cores, negated.
//
// A thread holds, of a row, 32 columns in a row of each 128: sixteen bytes. Four lanes t = 0 to 3
// share a row, and column 32 t + 8 j + 4 h + b goes to place 16 h + 4 t + (b ^ 1) of product j of
// 32 columns, which is register 2 h of the operand (2 h + 1 for the row 8 below). The right operand
// lies in that order already (`interleave`). So a thread needs the magnitudes of E2M1 times the
// scale of a block once for all the codes of the block: eight bytes, a table in two registers.
//
// Arithmetic and results are those of ops/decode_fp4, whose scales for rows are these too.

#define NVFP4 (GROUP == 16)
// Scales of 128 rows and 128 columns, in blocks of 128 rows x 4: one after another in memory.
constexpr int SCALE_BLOCK_BYTES = 512;
constexpr int SCALE_BYTES = SCALE_BLOCK_BYTES * (NVFP4 ? 2 : 1);

// The largest of the bytes of a word, and of `largest`, twice: of the even bytes, and of the odd.
__device__ __forceinline__ void take_largest(u32 (&largest)[2], u32 word) {
    largest[0] = __vmaxu2(largest[0], word & 0x00FF00FF);
    largest[1] = __vmaxu2(largest[1], (word >> 8) & 0x00FF00FF);
}

// Bits of the scale of a row whose largest scale of a block is this byte, and of its inverse.
struct RowScale {
    u32 scale, inverse;
};
__device__ __forceinline__ RowScale row_scale(u32 largest) {
#if NVFP4
    // The least 1.5 · 2^k of which 448 is no less than 6 of the largest; a NaN counts as 480.
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; shl.b16 h, h, 7; cvt.f32.f16 %0, h;}"
        : "=f"(value) : "r"(largest));
    value = fmaxf(fmaxf(value, 0.0f) * 256.0f, 0.001953125f);
    u32 exponent = ((__float_as_uint(value) + 0x1FFFFF) >> 23) - 6;
    return {(exponent << 23) | 0x400000, ((253 - exponent) << 23) | 0x2AAAAB};
#else
    u32 exponent = min(max(largest, 7), 254) - 6;
    return {exponent << 23, (254 - exponent) << 23};
#endif
}

// A thread's scales of 32 columns, as floats, from the bytes of two E4M3 or of one E8M0.
constexpr int FACTORS = NVFP4 ? 2 : 1;
__device__ __forceinline__ void factors_of(float (&factor)[FACTORS], u32 address, float inverse) {
#if NVFP4
    u32 halves;
    asm volatile("{.reg .b16 h; ld.shared.u16 h, [%1]; cvt.rn.f16x2.e4m3x2 %0, h;}"
                 : "=r"(halves) : "r"(address) : "memory");
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(factor[0]), "=f"(factor[1]) : "r"(halves));
    factor[0] *= inverse;
    factor[1] *= inverse;
#else
    u32 byte;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(address) : "memory");
    // 2^-127 is subnormal.
    u32 bits = byte == 0 ? 0x400000 : byte == 255 ? 0x7FC00000 : byte << 23;
    factor[0] = __uint_as_float(bits) * inverse;
#endif
}

struct Table {
    u32 low, high;
};
__device__ __forceinline__ Table table_of(float factor) {
    Table table;
    asm("{.reg .f32 a, b; .reg .b16 c, d;\n"
        "mul.f32 a, %2, 0f00000000; mul.f32 b, %2, 0f3F000000;\n"
        "cvt.rn.satfinite.e4m3x2.f32 c, b, a;\n"
        "mul.f32 a, %2, 0f3FC00000; cvt.rn.satfinite.e4m3x2.f32 d, a, %2;\n"
        "mov.b32 %0, {c, d};\n"
        "mul.f32 a, %2, 0f40000000; mul.f32 b, %2, 0f40400000;\n"
        "cvt.rn.satfinite.e4m3x2.f32 c, b, a;\n"
        "mul.f32 a, %2, 0f40800000; mul.f32 b, %2, 0f40C00000;\n"
        "cvt.rn.satfinite.e4m3x2.f32 d, b, a;\n"
        "mov.b32 %1, {c, d};}"
        : "=r"(table.low), "=r"(table.high) : "f"(factor));
    return table;
}

// Numbers that the compiler does not know, so that it multiplies, beside the logic that keeps
// another unit busy, and keeps them in registers: 2 and 0x40404040.
struct Numbers {
    u32 two, positive;
};

// Four codes, the low half of `codes`, as bytes of E4M3, negated. `prmt` looks magnitudes up by
// three bits. By four it gives a byte, 0x40, or its sign instead, 0: doubled, the bit of the sign
// that the negated number has.
__device__ __forceinline__ u32 look_up(u32 codes, const Table& table, const Numbers& numbers) {
    u32 magnitudes, positive;
    asm("prmt.b32 %0, %1, %2, %3;"
        : "=r"(magnitudes) : "r"(table.low), "r"(table.high), "r"(codes & 0x7777));
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(positive) : "r"(numbers.positive), "r"(codes));
    return positive * numbers.two + magnitudes;
}
