"""`mxfp4_mm` by our Triton kernels, on GPUs with FP4 tensor cores. Runs when named."""

import torch

from ..decode_fp4 import MXFP4_GROUP
from ..decode_fp4.triton import WORD, words
from ..registry import BY_NAME, Backend, Needs, register
from . import OP, SCHEME

# Of a program that quantizes; and of the product, which nobody measured: with 8 warps, as 4 spill
# registers.
ROWS, COLUMNS, QUANTIZER_WARPS = 4, 1024, 4
BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M = 128, 128, 256, 8
WARPS, STAGES = 8, 3
# `tl.dot_scaled` in 4 bits on both kinds of Blackwell.
TRITON_MIN = (3, 6)
FIRST_WITH_FP4 = (10, 0)


def quantize(x: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (packed, scale) of x as the reference's `quantize` does."""
    from .kernel import quantize_mxfp4_kernel

    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    packed = torch.empty(m, columns // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(m, columns // MXFP4_GROUP, dtype=torch.uint8, device=x.device)
    grid = (-(-m // ROWS), -(-columns // COLUMNS))
    sizes = (m, k, columns, x.stride(0))
    with torch.cuda.device_of(x):
        quantize_mxfp4_kernel[grid](
            x, packed, scale, *sizes, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=QUANTIZER_WARPS
        )
    return packed, scale


def run(x, packed, scale, bias, n) -> torch.Tensor:
    """Return the product as `mxfp4_mm` describes it."""
    from .kernel import mxfp4_mm_kernel

    (m, k), columns = x.shape, 2 * packed.shape[1]
    stored, of_x = quantize(x, columns)
    out = x.new_empty(m, n)
    sizes = (m, n, k, columns, -(-columns // MXFP4_GROUP // WORD))
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "GROUP_M": GROUP_M}
    options = {"num_warps": WARPS, "num_stages": STAGES}
    with torch.cuda.device_of(x):
        mxfp4_mm_kernel[(-(-m // BLOCK_M) * -(-n // BLOCK_N),)](
            stored, of_x, packed, words(scale), bias, out, 0.0, *sizes, **tile, **options
        )
    return out


NEEDS = Needs(
    frozenset({SCHEME}),
    devices=frozenset({"cuda"}),
    capability=FIRST_WITH_FP4,
    # No GPU that has the instructions has measured it.
    measured=BY_NAME,
    package="triton",
    package_min=TRITON_MIN,
)
register(Backend(OP, "triton", 10, NEEDS, run))
