"""Whether block scales are swizzled as a format wants them: what the file alone can prove.

The payload says nothing: the largest code of a block is the format's largest whatever its scale.
But scales follow their weight, in which whole rows and whole columns are larger than others; read
in a wrong order, that pattern of rows and columns breaks. And swizzled scales are padded with
zeros, which lie elsewhere after swizzling twice.

Not detectable: the order of two nibbles in a byte (it swaps neighbouring columns, which share a
scale), and a wrong order of scales that have no pattern of rows and columns, such as noise's.
"""

import math

import torch
from comfy_kitchen.float_utils import from_blocked

from .formats._blocks import COLUMNS, ROWS, round_up

FLAT = "not swizzled"
SWIZZLED = "swizzled"
TWICE = "swizzled twice"
EITHER = f"{FLAT}, or {TWICE}"

# Standard deviations above chance by which another order must show rows and columns, and how many
# times more than the order that the format wants. Noise stays near 0 in all three orders.
CERTAIN = 20.0
CLEARER = 2.0
# Rows that are looked at: each order moves scales within bands of 128 rows only.
ROWS_SEEN = 8 * ROWS


def wrong_order(scale: torch.Tensor, rows: int, columns: int) -> str | None:
    """Return FLAT, TWICE or EITHER when scales are provably not swizzled once, else None.

    scale: E4M3 or E8M0 block scales as stored. rows, columns: of the scales, [N, K / group],
    without padding. A wrong number of elements is not this function's to report.
    """
    shape = (round_up(rows, ROWS), round_up(columns, COLUMNS))
    if scale.numel() != math.prod(shape):
        return None
    stored = scale.reshape(shape)
    if shape != (rows, columns):
        once = _unswizzle(stored)
        twice = _unswizzle(once)
        wrong = _padding_holds(once, rows, columns) and not _padding_holds(twice, rows, columns)
        return TWICE if wrong else None
    stored = stored[:ROWS_SEEN]
    once = _unswizzle(stored)
    twice = _unswizzle(once)
    wanted = _pattern(once)
    found = {FLAT: _pattern(stored), TWICE: _pattern(twice)}
    order, other = sorted(found, key=found.get, reverse=True)
    if found[order] <= max(CERTAIN, CLEARER * wanted):
        return None
    return order if found[order] > CLEARER * found[other] else EITHER


def proven_order(scale: torch.Tensor, rows: int, columns: int) -> tuple[str | None, float]:
    """Return (FLAT, SWIZZLED or TWICE, deviations above chance); (None, …) where none is proven.

    scale: one-byte block scales as stored, as many as a weight with `rows` by `columns` of them
    takes, padded or not. What sizes or padding prove has infinite deviations; padding that is not
    zero proves nothing, so that SWIZZLED is then what is left, with 0.
    """
    shape = (round_up(rows, ROWS), round_up(columns, COLUMNS))
    if shape != (rows, columns):
        if scale.numel() == rows * columns:
            return FLAT, math.inf
        if wrong_order(scale, rows, columns) == TWICE:
            return TWICE, math.inf
        holds = _padding_holds(_unswizzle(scale.reshape(shape)), rows, columns)
        return SWIZZLED, 0.0 if holds else math.inf
    stored = scale.reshape(shape)[:ROWS_SEEN]
    once = _unswizzle(stored)
    found = {FLAT: stored, SWIZZLED: once, TWICE: _unswizzle(once)}
    found = {order: _pattern(values) for order, values in found.items()}
    best, second, _ = sorted(found, key=found.get, reverse=True)
    certain = found[best] > max(CERTAIN, CLEARER * found[second])
    return best if certain else None, found[best]


def _unswizzle(scale: torch.Tensor) -> torch.Tensor:
    codes = from_blocked(scale.contiguous().view(torch.uint8), *scale.shape)
    return codes.contiguous().view(scale.dtype)


def _padding_holds(scale: torch.Tensor, rows: int, columns: int) -> bool:
    """Return whether the padding holds anything but zeros."""
    codes = scale.view(torch.uint8)
    return bool(codes[rows:].any() or codes[:, columns:].any())


def _pattern(scale: torch.Tensor) -> float:
    """Return how clearly rows and columns show in log2 of the scales, in deviations above chance.

    Of independent values, rows and columns explain a chi-squared share with R + C - 2 degrees of
    freedom of the variance; analysis of variance without interaction.
    """
    values = scale.float().clamp_min(torch.finfo(torch.float32).tiny).log2().double()
    rows, columns = values.shape
    values = values - values.mean()
    total = values.square().sum().item()
    freedom = rows + columns - 2
    if not total or not freedom or not math.isfinite(total):
        return 0.0
    explained = columns * values.mean(dim=1).square().sum() + rows * values.mean(0).square().sum()
    share = explained.item() / (total / (rows * columns - 1))
    return (share - freedom) / math.sqrt(2 * freedom)
