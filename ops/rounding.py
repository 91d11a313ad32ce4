"""Rounding to small floating-point grids: FP8 E4M3 and E5M2, FP4 E2M1.

Stochastic rounding takes a value up or down with a chance equal to its distance, so that a change
smaller than a step (a LoRA on a quantized weight) survives on average instead of being lost.
"""

import torch

# The scale of a row, block or tensor of zeros: no scale is ever zero. The smallest normal float32.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

# Explicit mantissa bits and the exponent of the smallest normal number.
GRIDS = {
    torch.float8_e4m3fn: (3, -6, 448.0),
    torch.float8_e5m2: (2, -14, 57344.0),
    "e2m1": (1, 0, 6.0),
}


def round_stochastic(x: torch.Tensor, grid: torch.dtype | str, seed: int) -> torch.Tensor:
    """Return x rounded stochastically to `grid`, as float32 values that the grid holds exactly.

    x: any shape, float. grid: a key of GRIDS. seed: of the random numbers. Values beyond the grid's
    largest magnitude clamp to it; NaN stays NaN.
    """
    mantissa_bits, min_exponent, largest = GRIDS[grid]
    x = x.float()
    generator = torch.Generator(device=x.device).manual_seed(seed)
    noise = torch.rand(x.shape, generator=generator, device=x.device)
    # frexp gives x = m · 2^e with 0.5 <= |m| < 1, so the leading bit has exponent e - 1.
    exponent = (torch.frexp(x).exponent - 1).clamp_min(min_exponent)
    step = torch.ldexp(torch.ones_like(x), exponent - mantissa_bits)
    steps = x / step
    low = torch.floor(steps)
    # Compared, not added to `steps`: the sum would round up to the next step now and then.
    return ((low + (noise < steps - low)) * step).clamp(-largest, largest)
