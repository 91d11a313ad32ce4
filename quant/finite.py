"""How many values of a tensor are NaN or Inf."""

from collections.abc import Iterable, Iterator, Mapping

import torch

# Bits that are all set in NaN, and in Inf where the type has it, whatever the sign.
CODES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C, torch.float8_e8m0fnu: 0xFF}
BYTES = {torch.uint8, torch.int8}


# Values that are looked at together: what is made of them takes little memory.
PIECE = 1 << 22


def count_not_finite(tensor: torch.Tensor) -> int:
    """Return how many values of `tensor` are NaN or Inf; 8-bit floats by their codes."""
    if tensor.dtype in CODES:
        code, flat = CODES[tensor.dtype], tensor.reshape(-1).view(torch.uint8)
        return sum(int(torch.count_nonzero(p & code == code)) for p in flat.split(PIECE))
    if not tensor.is_floating_point():
        return 0
    pieces = tensor.reshape(-1).split(PIECE)
    return tensor.numel() - sum(int(torch.count_nonzero(p.isfinite())) for p in pieces)


def not_finite(
    parts: Iterable[tuple[str, torch.Tensor]], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, int]]:
    """Yield (part, count) of those of `parts` that hold NaN or Inf.

    dtypes: part → what plain bytes of it stand for.
    """
    for part, tensor in parts:
        dtype = dtypes.get(part, tensor.dtype)
        named = tensor.dtype in BYTES and dtype.itemsize == 1
        if count := count_not_finite(tensor.view(dtype) if named else tensor):
            yield part, count
