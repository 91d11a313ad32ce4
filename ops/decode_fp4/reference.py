"""`decode_fp4` in plain torch, on any device."""

import torch

from ..registry import Backend, Needs, register
from . import E2M1, MXFP4_GROUP, NVFP4_GROUP, OP, SCHEMES

# Rows and columns of a block of swizzled scales, and the rows that lie one after another in it.
ROWS, COLUMNS, QUARTER = 128, 4, 32
E4M3 = torch.float8_e4m3fn
# E4M3's largest value over E2M1's is 74.7; the least 1.5 · 2^k that scales to it, of 1.5 · 112.
LARGEST = 112.0
E4M3_TINY = 2.0**-9
# The largest power of two that times 6 is an E4M3 value: 6 · 2^6 = 384.
MX_EXPONENT = 6
E8M0_BIAS, E8M0_NAN = 127, 255
NAN_COUNTS_AS = {NVFP4_GROUP: 480.0, MXFP4_GROUP: 2.0**127}


def unswizzle(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the first rows and columns of swizzled scales, [rows, columns], of the same dtype."""
    wide = -(-columns // COLUMNS)
    # As many rows as there are: padding may be more than the next multiple.
    blocks = scale.reshape(-1, wide, QUARTER, ROWS // QUARTER, COLUMNS)
    plain = blocks.permute(0, 3, 2, 1, 4).reshape(-1, wide * COLUMNS)
    return plain[:rows, :columns]


def codes(packed: torch.Tensor) -> torch.Tensor:
    """Return the E2M1 values of packed [N, K / 2], [N, K] float32; the even column is high."""
    both = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)
    return torch.tensor(E2M1, device=packed.device)[both.long()]


def values(byte: torch.Tensor, group: int) -> torch.Tensor:
    """Return the values of scales [...], float32; E4M3 or E8M0 bytes."""
    if group == NVFP4_GROUP:
        return byte.view(E4M3).float()
    value = torch.ldexp(torch.ones_like(byte, dtype=torch.float32), byte.int() - E8M0_BIAS)
    return torch.where(byte == E8M0_NAN, torch.nan, value)


def row_scale(block: torch.Tensor, group: int) -> torch.Tensor:
    """Return the scale of E4M3 rows [N, 1] float32 for scales of blocks [N, K / group]."""
    # A NaN, which is the row's end, counts as the largest that its bits could be.
    largest = torch.nan_to_num(block, nan=NAN_COUNTS_AS[group]).abs().amax(dim=1, keepdim=True)
    if group == MXFP4_GROUP:
        return largest.clamp_min(2.0 ** (7 - E8M0_BIAS)) * 2.0**-MX_EXPONENT
    mantissa, exponent = torch.frexp(largest.clamp_min(E4M3_TINY) / LARGEST)
    # frexp gives 0.5 <= m < 1: the least 2^k that is not below is 2^exponent, or m's own.
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.full_like(largest, 1.5), exponent)


def run(packed, scale, tensor_scale, n, k, group, dtype):
    """Return (stored [n, K'], scale of the rows [n, 1] or None) as `decode_fp4` describes them."""
    packed = packed[:n]
    columns = 2 * packed.shape[1]
    block = values(unswizzle(scale, n, columns // group), group)
    factor, rows = block, None
    if dtype == E4M3:
        rows = row_scale(block[:, : -(-k // group)], group)
        factor = block * (1.0 / rows)
        rows = rows if tensor_scale is None else rows * tensor_scale
    value = codes(packed) * factor.repeat_interleave(group, dim=1)
    value[:, k:] = 0
    return value.to(dtype), rows


register(Backend(OP, "reference", 100, Needs(frozenset(SCHEMES)), run))
