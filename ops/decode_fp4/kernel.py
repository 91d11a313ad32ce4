"""The Triton kernel behind `decode_fp4`, and what other kernels decode FP4 with.

Bytes are decoded with integer instructions: FP8 types, which Triton lacks below SM89, occur only
where the result is one. Scales lie swizzled in blocks of 128 rows x 4 scales, 512 bytes each: scale
c of row r is byte (r % 32) · 16 + (r % 128 // 32) · 4 + c % 4 of block (r // 128, c // 4). Four
scales of a row are one word.
"""

import triton
import triton.language as tl

BLOCK_ROWS: tl.constexpr = tl.constexpr(128)
QUARTER: tl.constexpr = tl.constexpr(32)
WORD: tl.constexpr = tl.constexpr(4)
# Words of a row that are looked at together for its largest scale.
CHUNK: tl.constexpr = tl.constexpr(16)
# Elements per scale of NVFP4; MXFP4 has the other number.
NVFP4_GROUP: tl.constexpr = tl.constexpr(16)
# 2^8 lies between the exponents of FP16 and of E4M3.
E4M3_UNIT: tl.constexpr = tl.constexpr(256.0)
E4M3_TINY: tl.constexpr = tl.constexpr(2.0**-9)
E4M3_NAN: tl.constexpr = tl.constexpr(0x7F)
E8M0_NAN: tl.constexpr = tl.constexpr(0xFF)
# Of a float32: bits of the mantissa; what carries a mantissa above 1.75 into the exponent; what
# makes 2^k 1.5 · 2^k, and 2^-k 2^-k / 0.75, so that 2^-(k + 1) / 0.75 is the inverse of that.
MANTISSA: tl.constexpr = tl.constexpr(23)
ABOVE_7_4: tl.constexpr = tl.constexpr(0x1FFFFF)
HALF: tl.constexpr = tl.constexpr(0x400000)
THIRD: tl.constexpr = tl.constexpr(0x2AAAAB)
# The interpreter has no PTX.
PTX: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)


def _decoder(high: int, low: str, mask: str, unit: str) -> tl.constexpr:
    """Return PTX that makes 16-bit floats of four bytes: of high nibbles two pairs, then of low.

    Each byte moves to the upper half of a 16-bit word. There its nibble's sign becomes the word's,
    its magnitude the lowest exponent bits and the highest mantissa bit, so that E2M1's subnormal is
    the float's; `unit`, an instruction with an operand, undoes the difference of the exponents.
    """
    halves = "".join(
        f"""
        shr.b32 t, {source}, {high};
        and.b32 t, t, {mask};
        lop3.b32 t, {source}, 0x80008000, t, 0xEA;
        {unit.format(out=f"${index}")}
        shl.b32 u, {source}, 4;
        {low.format(source=source)}
        and.b32 t, t, {mask};
        lop3.b32 t, u, 0x80008000, t, 0xEA;
        {unit.format(out=f"${index + 2}")}"""
        for index, source in enumerate("ab")
    )
    spread = "prmt.b32 a, $4, 0, 0x1404; prmt.b32 b, $4, 0, 0x3424;"
    return tl.constexpr(f"{{ .reg .b32 a, b, c, d, t, u; {spread} {halves} }}")


TO_FP16 = _decoder(
    *(3, "shl.b32 t, {source}, 1;", "0x0E000E00"),
    # Times 2^14, minus zero to keep the sign of a zero.
    "mov.b32 c, 0x74007400; mov.b32 d, 0x80008000; fma.rn.f16x2 {out}, t, c, d;",
)
TO_BF16 = _decoder(
    *(6, "shr.b32 t, {source}, 2;", "0x01C001C0"),
    # Times 2^126.
    "mov.b32 c, 0x7E807E80; mov.b32 d, 0x80008000; fma.rn.bf16x2 {out}, t, c, d;",
)

# The magnitudes of E2M1 times a factor, in E4M3: eight bytes, a table in two registers.
TABLE: tl.constexpr = tl.constexpr(
    """{
    .reg .f32 a, b; .reg .b16 c, d;
    mul.f32 a, $2, 0f00000000; mul.f32 b, $2, 0f3F000000; cvt.rn.satfinite.e4m3x2.f32 c, b, a;
    mul.f32 a, $2, 0f3FC00000; cvt.rn.satfinite.e4m3x2.f32 d, a, $2;
    mov.b32 $0, {c, d};
    mul.f32 a, $2, 0f40000000; mul.f32 b, $2, 0f40400000; cvt.rn.satfinite.e4m3x2.f32 c, b, a;
    mul.f32 a, $2, 0f40800000; mul.f32 b, $2, 0f40C00000; cvt.rn.satfinite.e4m3x2.f32 d, b, a;
    mov.b32 $1, {c, d};
    }"""
)
# Eight codes looked up in it, four by one instruction, which takes nibbles as they are. Their
# highest bits, as sign bits of a byte 0x80 that is copied or spread, give 0x80 or 0xFF. At the end
# the bytes of neighbours change places: the even column is the high nibble.
LOOK_UP: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 m, n, x, y, s;
    and.b32 m, $2, 0x77777777;
    and.b32 n, $2, 0x88888888;
    mov.b32 s, 0x80;
    prmt.b32 x, $3, $7, m;
    prmt.b32 y, s, 0, n;
    shl.b32 y, y, 1;
    lop3.b32 x, x, y, 0x80808080, 0xF8;
    prmt.b32 $0, x, 0, 0x2301;
    shr.b32 m, m, 16;
    shr.b32 n, n, 16;
    prmt.b32 x, $3, $7, m;
    prmt.b32 y, s, 0, n;
    shl.b32 y, y, 1;
    lop3.b32 x, x, y, 0x80808080, 0xF8;
    prmt.b32 $1, x, 0, 0x2301;
    }"""
)


@triton.jit
def _plain(code):
    """Return the value of E2M1 codes [...] uint8, float32."""
    exponent = ((code >> 1) & 3).to(tl.int32)
    mantissa = (code & 1).to(tl.int32)
    quarters = tl.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent)
    value = quarters.to(tl.float32) * 0.25
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def decode(packed, DTYPE: tl.constexpr):
    """Return the E2M1 values of packed [R, C / 2] uint8, [R, C], FP16 or BF16."""
    if PTX:
        if tl.bfloat16 == DTYPE:
            high, low = tl.inline_asm_elementwise(
                TO_BF16, "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16), True, 4
            )
        else:
            high, low = tl.inline_asm_elementwise(
                TO_FP16, "=r,=r,=r,=r,r", [packed], (tl.float16, tl.float16), True, 4
            )
    else:
        high = _plain(packed >> 4).to(DTYPE)
        low = _plain(packed & 15).to(DTYPE)
    # The even column is the high nibble.
    both = tl.join(high, low)
    return tl.reshape(both, (packed.shape[0], 2 * packed.shape[1]))


@triton.jit
def load_words(scale, rows, inside, first, words, COUNT: tl.constexpr):
    """Return words `first` and on, each four scales along K, of each row, [R, COUNT] int32.

    scale: pointer to swizzled scales, as words. words: of a row. Outside, 0.
    """
    word = first + tl.arange(0, COUNT)
    # There are 64 elements to a word, so that 32 bits index them.
    start = rows // BLOCK_ROWS * words * BLOCK_ROWS
    start += rows % QUARTER * WORD + rows % BLOCK_ROWS // QUARTER
    at = scale + (start[:, None] + (word * BLOCK_ROWS)[None, :])
    return tl.load(at, mask=inside[:, None] & (word < words)[None, :], other=0)


@triton.jit
def to_bytes(words):
    """Return the four scales in each word, [R, 4 · COUNT] int32."""
    shift = tl.arange(0, WORD) * 8
    four = (words[:, :, None] >> shift[None, None, :]) & 0xFF
    return tl.reshape(four, (words.shape[0], WORD * words.shape[1]))


@triton.jit
def to_value(byte, GROUP: tl.constexpr):
    """Return the values of scales, float32: E4M3 of NVFP4, E8M0 of MXFP4."""
    if GROUP == NVFP4_GROUP:
        half = ((byte & 0x80) << 8) | ((byte & E4M3_NAN) << 7)
        value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * E4M3_UNIT
        return tl.where((byte & E4M3_NAN) == E4M3_NAN, float("nan"), value)
    else:
        # 2^-127 is subnormal.
        bits = tl.where(byte == 0, HALF, byte << MANTISSA)
        value = bits.to(tl.float32, bitcast=True)
        return tl.where(byte == E8M0_NAN, float("nan"), value)


@triton.jit
def _larger(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def _largest(scale, rows, inside, words, count, WORDS: tl.constexpr, RAGGED: tl.constexpr):
    """Return the largest of the `count` scales of each row, as a byte, [ROWS] int32.

    In the highest byte of a word a scale is compared by comparing words. RAGGED: the last word of a
    row has scales that do not count. A NaN counts as the largest of all.
    """
    none = tl.zeros((rows.shape[0], CHUNK), tl.uint32)
    best = (none, none, none, none)
    for start in tl.static_range(0, WORDS, CHUNK):
        word = load_words(scale, rows, inside, start, words, CHUNK)
        if RAGGED:
            left = count - (start + tl.arange(0, CHUNK)) * WORD
            counting = tl.where(left < WORD, (1 << (8 * tl.maximum(left, 0))) - 1, -1)
            word &= counting[None, :]
        word = word.to(tl.uint32, bitcast=True)
        best = _larger(*best, word, word << 8, word << 16, word << 24)
    both = tl.maximum(tl.maximum(best[0], best[1]), tl.maximum(best[2], best[3]))
    return (tl.max(both, axis=1) >> 24).to(tl.int32)


@triton.jit
def _row_scale(largest, GROUP: tl.constexpr):
    """Return (scale of a row of E4M3, its inverse): 1.5 · 2^k for NVFP4, 2^k for MXFP4, float32.

    k is the least with which 6, E2M1's largest, times the largest scale of a block is at most 448.
    """
    if GROUP == NVFP4_GROUP:
        # A NaN, which is the row's end, counts as 480 here.
        value = tl.maximum((largest << 7).to(tl.int16).to(tl.float16, bitcast=True), 0.0)
        value = tl.maximum(value.to(tl.float32) * E4M3_UNIT, E4M3_TINY)
        # Of the least 2^k that is not below value / 112, 112 = 1.75 · 2^6.
        exponent = ((value.to(tl.int32, bitcast=True) + ABOVE_7_4) >> MANTISSA) - 6
        bits = (exponent << MANTISSA) | HALF
        inverse = (253 - exponent) << MANTISSA | THIRD
    else:
        # No scale is below the smallest normal float32; a NaN counts as the largest.
        exponent = tl.minimum(tl.maximum(largest, 7), 254) - 6
        bits = exponent << MANTISSA
        inverse = (254 - exponent) << MANTISSA
    return bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _to_e4m3(codes, factor, GROUP: tl.constexpr):
    """Return E2M1 times the factor of its block in E4M3, as the two bytes of a byte of codes.

    codes: [R, C / 2] uint8. factor: [R, C / GROUP] float32. Returns [R, C / 2] uint16, the even
    column low.
    """
    low, high = tl.inline_asm_elementwise(TABLE, "=r,=r,f", [factor], (tl.int32, tl.int32), True, 1)
    shape: tl.constexpr = (codes.shape[0], codes.shape[1] * 2 // GROUP, GROUP // 2)
    low = tl.reshape(tl.broadcast_to(low[:, :, None], shape), codes.shape)
    high = tl.reshape(tl.broadcast_to(high[:, :, None], shape), codes.shape)
    constraints: tl.constexpr = "=r,=r,r,r,r,r,r,r,r,r,r"
    return tl.inline_asm_elementwise(LOOK_UP, constraints, [codes, low, high], tl.uint16, True, 4)


@triton.jit
def decode_fp4_kernel(
    packed,
    scale,
    tensor_scale,
    stored,
    row_scale,
    N,
    K,
    columns,
    words,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    RAGGED: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """stored [N, columns] = E2M1 · scale of the block, exact, or, to E4M3, over a scale of the row.

    packed: [≥ N, columns / 2] uint8, the even column in the high nibble. scale: words of the
    swizzled scales, `words` a row. tensor_scale: [1] float32 or None. row_scale: [N] float32, of
    E4M3 only: the scale of the row times that of the tensor. PADDED: columns from K on give 0.
    A program has ROWS rows, which lie so that it uses whole sectors of the scales, and COLUMNS
    columns. ROW_WORDS: `words`. RAGGED: some of them have padding, which counts for
    nothing, whatever it holds.
    """
    DTYPE: tl.constexpr = stored.dtype.element_ty
    E4M3: tl.constexpr = row_scale is not None
    HALVES: tl.constexpr = tl.bfloat16 if tl.bfloat16 == DTYPE else tl.float16
    if PDL:
        # Nothing is read or written above; see `scaled_mm`'s kernel.
        tl.extra.cuda.gdc_wait()
    parts = tl.cdiv(columns, COLUMNS)
    part = tl.program_id(0) % parts
    group = tl.program_id(0) // parts
    IN_QUARTER: tl.constexpr = ROWS // 4
    i = tl.arange(0, ROWS)
    rows = group // (QUARTER // IN_QUARTER) * BLOCK_ROWS
    rows += (
        group % (QUARTER // IN_QUARTER) * IN_QUARTER + i % IN_QUARTER + i // IN_QUARTER * QUARTER
    )
    in_rows = rows < N
    half = part * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = in_rows[:, None] & (half < columns // 2)[None, :]
    at = packed + rows.to(tl.int64)[:, None] * (columns // 2) + half[None, :]
    codes = tl.load(at, mask=inside, other=0)
    WORDS: tl.constexpr = COLUMNS // GROUP // 4
    some = load_words(scale, rows, in_rows, part * WORDS, words, WORDS)
    factor = to_value(to_bytes(some), GROUP)
    if E4M3:
        best = _largest(scale, rows, in_rows, words, tl.cdiv(K, GROUP), ROW_WORDS, RAGGED)
        row, inverse = _row_scale(best, GROUP)
        factor *= inverse[:, None]
        if tensor_scale is not None:
            row *= tl.load(tensor_scale)
        tl.store(row_scale + rows, row, mask=in_rows & (part == 0))
    at = rows.to(tl.int64)[:, None] * columns
    if E4M3 and PTX:
        pair = _to_e4m3(codes, factor, GROUP)
        if PADDED:
            pair = tl.where((2 * half < K)[None, :], pair, 0)
            pair = tl.where((2 * half + 1 < K)[None, :], pair, pair & 0xFF)
        at = (stored + at).to(tl.pointer_type(tl.uint16)) + half[None, :]
        tl.store(at, pair, mask=inside)
    else:
        value = decode(codes, HALVES).to(tl.float32)
        value = tl.reshape(value, (ROWS, COLUMNS // GROUP, GROUP)) * factor[:, :, None]
        value = tl.reshape(value, (ROWS, COLUMNS))
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        if PADDED:
            value = tl.where((column < K)[None, :], value, 0.0)
        at = stored + at + column[None, :]
        tl.store(at, value.to(DTYPE), mask=in_rows[:, None] & (column < columns)[None, :])
