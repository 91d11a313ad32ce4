"""Quantizing to block-scaled formats with scales chosen by their error.

The largest magnitude of a block fixes its scale only up to a choice: NVFP4 may put it at 6 or at 4
(Cook et al., "Four Over Six"), or a step of E4M3 beside; MX formats may cut it off and halve every
other error. Each candidate is tried, and the block keeps the one of least squared error. The first
candidate is comfy-kitchen's where it has the format, so no block errs more than by its quantizer; a
least-squares scale for the codes of a candidate errs more than its neighbours tried in full.

Everything is elementwise, so blocks do not depend on what is quantized beside them, nor on strides,
devices or threads. Within, a block is a column of [group, blocks]: scales and sums are rows then,
several times as fast on a CPU.
"""

from collections.abc import Callable, Iterator

import torch

from .rounding import GRIDS

E2M1 = "e2m1"
E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
E4M3_MAX_CODE = 126
# E8M0 of a block that is not zero: 0 is 2^-127, which comfy-kitchen reads as zero; 255 is NaN.
E8M0_RANGE = (1, 254)
E8M0_BIAS = 127
NAN_CODE = {torch.float8_e4m3fn: 127, torch.float8_e8m0fnu: 255}
EXPONENT_BITS = 0x7F800000
MANTISSA_BITS = 23
# Elements worked on at a time: their float32 copies stay near a CPU's caches.
PIECE_ELEMENTS = 1 << 20


def nvfp4(values: torch.Tensor, tensor_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed [N, K/2] uint8, block scales [N, K/16] E4M3), not swizzled.

    values: [N, K] float32, K a multiple of 16. tensor_scale: float32 scalar, amax / 2688 or more.
    The even column is the high nibble.
    """

    def candidates(largest: torch.Tensor) -> Iterator[torch.Tensor]:
        # In comfy-kitchen's order of operations, that the first is its very scale.
        six, four = (_e4m3_code(largest / top / tensor_scale) for top in (6, 4))
        yield from (six, four, six - 1, six + 1, four - 1)

    def decode(codes: torch.Tensor) -> torch.Tensor:
        return tensor_scale * codes.view(E4M3).float()

    return _quantize(values, 16, E2M1, candidates, (1, E4M3_MAX_CODE), decode, E4M3)


def mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed [N, K/2] uint8, block scales [N, K/32] E8M0), not swizzled.

    values: [N, K] float32, K a multiple of 32. The first candidate is that of the OCP MX standard
    (section 6.3), which may cut off a block's largest value; the other never does.
    """

    def candidates(largest: torch.Tensor) -> Iterator[torch.Tensor]:
        # frexp gives 0.5 <= m < 1; the largest power of two of E2M1 is 4.
        exponent = torch.frexp(largest).exponent - 1 - 2 + E8M0_BIAS
        yield from (exponent, exponent + 1)

    return _quantize(values, 32, E2M1, candidates, E8M0_RANGE, e8m0_to_float, torch.float8_e8m0fnu)


def mxfp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored [N, K] E4M3, block scales [N, K/32] E8M0), not swizzled.

    values: [N, K] float32, K a multiple of 32. The first candidate is comfy-kitchen's, which never
    cuts off; the other, half of it, is tried where it can win: every value but the largest has the
    same relative step under both, so it must cut off less than the largest is rounded by.
    """

    def candidates(largest: torch.Tensor) -> Iterator[torch.Tensor]:
        needed = (largest / E4M3_MAX).clamp_min(2.0**-E8M0_BIAS)
        exponent = torch.ceil(torch.log2(needed)).int() + E8M0_BIAS
        yield from (exponent, exponent - 1)

    def open_to_choice(largest: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        # Under half the scale, a value above 464 loses more than 16 by being cut off at 448; under
        # the whole one at most 16, as the grid has 224, 240 and 256. One more is for the values
        # below the smallest normal number, whose steps do differ.
        return largest <= 465 / 2 * e8m0_to_float(codes.to(torch.uint8))

    limits, scales = E8M0_RANGE, torch.float8_e8m0fnu
    return _quantize(values, 32, E4M3, candidates, limits, e8m0_to_float, scales, open_to_choice)


def e8m0_without_cutting(largest: torch.Tensor, top: float) -> torch.Tensor:
    """Return the least E8M0 codes (uint8) by which no magnitude up to `largest` exceeds `top`.

    largest: float32, not negative; 0 gives code 0.
    """
    fraction, exponent = torch.frexp(largest)
    limit, of_top = torch.frexp(torch.tensor(top, device=largest.device))
    code = exponent - of_top + (fraction > limit) + E8M0_BIAS
    return torch.where(largest == 0, 0, code.clamp(*E8M0_RANGE)).to(torch.uint8)


def e8m0_to_float(codes: torch.Tensor) -> torch.Tensor:
    """Return 2^(code - 127), float32, NaN for 255; codes: uint8 or E8M0."""
    return codes.view(torch.float8_e8m0fnu).float()


def pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Return values of the E2M1 grid [N, K], float32, as bytes [N, K/2], even columns high."""
    codes = _e2m1_codes(values.abs(), torch.signbit(values))
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Return the values [N, K], float32, of bytes [N, K/2], even columns high."""
    low = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=packed.device)
    table = torch.cat([low, -low])
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(packed.shape[0], -1)
    return table[codes.int()]


def _e4m3_code(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp_max(E4M3_MAX).to(E4M3).view(torch.uint8).int()


def _quantize(
    values: torch.Tensor,
    group: int,
    grid: torch.dtype | str,
    candidates: Callable[[torch.Tensor], Iterator[torch.Tensor]],
    limits: tuple[int, int],
    decode: Callable[[torch.Tensor], torch.Tensor],
    scale_dtype: torch.dtype,
    open_to_choice: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored, scales) of values [N, K]: per block the best candidate within `limits`.

    open_to_choice: (largest values, first candidates) → where another candidate can win; None:
    everywhere. A block of zeros has scale 0, one that holds NaN or Inf the scale NaN.
    """
    n = values.shape[0]
    stored, scales = [], []
    for piece in values.reshape(-1, group).split(PIECE_ELEMENTS // group):
        signed = piece.t().contiguous()
        magnitudes = signed.abs()
        largest = magnitudes.amax(dim=0)
        tried = (c.clamp(*limits) for c in candidates(largest))
        if open_to_choice is None:
            codes = _best(magnitudes, grid, tried, decode)
        else:
            codes = next(tried)
            few = open_to_choice(largest, codes).nonzero().squeeze(1)
            rest = (c[few] for c in (codes, *tried))
            codes = codes.index_copy(0, few, _best(magnitudes[:, few], grid, rest, decode))
        codes = torch.where(largest == 0, 0, codes)
        codes = torch.where(largest.isfinite(), codes, NAN_CODE[scale_dtype]).to(torch.uint8)
        scale = decode(codes)
        stored.append(_encode(signed, torch.where(codes == 0, torch.inf, scale), grid))
        scales.append(codes)
    return torch.cat(stored).view(n, -1), torch.cat(scales).view(n, -1).view(scale_dtype)


def _best(magnitudes, grid, candidates, decode) -> torch.Tensor:
    """Return the candidate codes [blocks] of least squared error, the first of equals."""
    work = tuple(torch.empty_like(magnitudes) for _ in range(3))
    best = least = unit = None
    for codes in candidates:
        scale = decode(codes.to(torch.uint8))
        # Relative to the first scale, that no square overflows or vanishes.
        unit = scale if unit is None else unit
        error = _squared_error(magnitudes, scale, grid, work) * (scale / unit).square()
        if best is None:
            best, least = codes, error
        else:
            better = error < least
            best, least = torch.where(better, codes, best), torch.where(better, error, least)
    return best


def _squared_error(magnitudes, scale, grid, work) -> torch.Tensor:
    """Return the sum over each block of (rounded - exact)², in units of scale²."""
    exact, step, rounded = work
    torch.div(magnitudes, scale, out=exact)
    _round(exact, grid, step, rounded).sub_(exact).square_()
    # Halves are added, not `sum`: its order depends on how many blocks there are.
    height = rounded.shape[0]
    while height > 1:
        height //= 2
        rounded[:height] += rounded[height : 2 * height]
    return rounded[0]


def _round(values, grid, step, out) -> torch.Tensor:
    """Return non-negative `values` rounded to nearest, ties to even, in `out`; step: scratch.

    A float32 sum with 2^23 steps rounds to whole steps; the step follows from the exponent.
    """
    mantissa_bits, min_exponent, largest = GRIDS[grid]
    torch.bitwise_and(values.view(torch.int32), EXPONENT_BITS, out=step.view(torch.int32))
    step.clamp_(min=2.0**min_exponent).mul_(2.0 ** (MANTISSA_BITS - mantissa_bits))
    return torch.add(values, step, out=out).sub_(step).clamp_(max=largest)


def _encode(signed: torch.Tensor, scale: torch.Tensor, grid) -> torch.Tensor:
    """Return the stored bytes [blocks, group or group / 2] of columns `signed` / scale."""
    if grid == E4M3:
        return (signed / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).t()
    magnitudes = signed.abs().div_(scale)
    rounded = _round(magnitudes, grid, torch.empty_like(signed), torch.empty_like(signed))
    negative = torch.signbit(signed).logical_and_(scale.isfinite())
    codes = _e2m1_codes(rounded, negative)
    return (codes[0::2] << 4 | codes[1::2]).t()


def _e2m1_codes(magnitudes: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Return the codes 0 to 15 (uint8) of magnitudes on the E2M1 grid, with their signs."""
    halves = magnitudes.mul(2).to(torch.uint8)
    # 0 to 4 are their own codes; then 6, 8 and 12 halves follow.
    codes = halves - (halves > 4).byte() - (halves > 6).byte() - (halves > 8).byte() * 3
    return codes | negative.byte() << 3
