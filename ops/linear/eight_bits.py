"""Which 8 bits err less for a 4-bit weight that W4A8 re-expresses: E4M3, or INT8.

In a layer's output both roundings show, the weight's and the activation's, and their squares add
up. The weight's is computed, from all of the weight. The activation's is not known before the model
runs: it is taken from what was measured on tokens with outlier channels (every 97th ten times as
large, K = 5120), since those are what 8 bits find hard in a diffusion transformer.
"""

import math

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..decode_fp4 import SCALE_COLUMNS, SCALE_ROWS, decode_fp4
from ..quantize_rows.reference import rotate
from .four_bit import W4A8_FP8, W4A8_INT8, FourBit, eight_bit, four_bit, has_fp8, rotation_of

# Relative L2 errors of a quantized activation: E4M3, INT8 after the rotation, INT8 without it.
FP8_ACTIVATION, ROTATED_ACTIVATION, INT8_ACTIVATION = 0.026, 0.009, 0.042
# Elements whose errors are taken at a time.
PIECE_ELEMENTS = 1 << 22


def eight_bit_errors(
    weight: QuantizedTensor, device: torch.device | None = None
) -> dict[str, float]:
    """Return the relative L2 error of re-expressing a 4-bit weight, by the name of the arithmetic.

    Against the very 4-bit values, `w4a8_fp8` and `w4a8_int8`. device: where it is computed, a piece
    of the weight at a time; None: where the weight is. A weight of zeros errs by 0. Raises
    ValueError when a scale of a block is NaN, or so large that a value is infinite.
    """
    w, totals = four_bit(weight), {W4A8_FP8: 0.0, W4A8_INT8: 0.0}
    rotated, size = rotation_of(w.shape) > 0, 0.0
    for piece in _pieces(w, device or w.packed.device):
        exact = decode_fp4(piece.packed, piece.scale, piece.shape, piece.group, torch.float32)
        size += _squares(exact)
        for name, dtype in ((W4A8_FP8, torch.float8_e4m3fn), (W4A8_INT8, torch.int8)):
            turned = rotated and dtype == torch.int8
            stored, scale = eight_bit(piece, dtype, turned)
            values = stored.float() * scale
            # The matrix is symmetric and its own inverse.
            values = rotate(values) if turned else values
            totals[name] += _squares(values - exact)
    if not all(map(math.isfinite, (size, *totals.values()))):
        raise ValueError(
            "the weight holds NaN or Inf, a block scale is corrupt: no 8 bits can be told to err "
            "less. Convert the layer again, or choose w4a8, which computes with it as it is"
        )
    return {name: (total / size) ** 0.5 if size else 0.0 for name, total in totals.items()}


def least_error(weight: QuantizedTensor, device: torch.device | None = None) -> str:
    """Return the arithmetic in which a layer with this 4-bit weight errs less: one of the two.

    device: where the layer is going to run, and where this is computed; None: where the weight is.
    INT8 where that has no FP8. Raises ValueError as `eight_bit_errors` does.
    """
    if not has_fp8(device or weight._qdata.device):
        return W4A8_INT8
    errors = eight_bit_errors(weight, device)
    rotated = rotation_of(tuple(weight.shape)) > 0
    activations = {
        W4A8_FP8: FP8_ACTIVATION,
        W4A8_INT8: ROTATED_ACTIVATION if rotated else INT8_ACTIVATION,
    }
    return min(errors, key=lambda name: errors[name] ** 2 + activations[name] ** 2)


def _pieces(w: FourBit, device: torch.device):
    """Yield a weight some rows at a time, on `device`, without the scale of the tensor."""
    (n, k), columns = w.shape, 2 * w.packed.shape[1]
    height = max(PIECE_ELEMENTS // columns // SCALE_ROWS, 1) * SCALE_ROWS
    # Swizzled scales of so many rows lie together.
    of_rows = SCALE_ROWS * -(-(columns // w.group) // SCALE_COLUMNS) * SCALE_COLUMNS
    blocks = w.scale.view(torch.uint8).reshape(-1).split(height // SCALE_ROWS * of_rows)
    for start, scale in zip(range(0, n, height), blocks, strict=True):
        rows = min(height, n - start)
        packed = w.packed[start : start + rows].to(device)
        yield FourBit(packed, scale.to(device), None, (rows, k), w.group)


def _squares(x: torch.Tensor) -> float:
    return x.double().square().sum().item()
