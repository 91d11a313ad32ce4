"""How many values of a tensor are NaN or Inf."""

from collections.abc import Iterable, Iterator, Mapping

import torch

# Bits that are all set in NaN, and in Inf where the type has it, whatever the sign.
CODES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C, torch.float8_e8m0fnu: 0xFF}
BYTES = {torch.uint8, torch.int8}


def count_not_finite(tensor: torch.Tensor) -> int:
    """Return how many values of `tensor` are NaN or Inf; 8-bit floats by their codes."""
    if tensor.dtype in CODES:
        code = CODES[tensor.dtype]
        masked = tensor.view(torch.uint8) & code
        return int((masked == code).sum()) if masked.numel() and masked.max() == code else 0
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


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
