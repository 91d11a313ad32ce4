"""The Triton backend of `scaled_mm`: how its kernel is launched."""

import functools

import torch

from .. import tuning
from ..launch import ALIGNMENT, alignment, launch
from ..registry import Backend, Needs, capability, register
from . import OP
from .tiles import Tile, choose


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(a, b, scale_a, scale_b, bias, zero_point, column_sum, out_dtype) -> torch.Tensor:
    """Return the product as `scaled_mm` describes it, cut as `tiles.py` says."""
    (m, k), n = a.shape, b.shape[0]
    processors = _processors(a.device)
    integer, wide = a.dtype == torch.int8, out_dtype == torch.float32
    tile = choose(capability(a.device), processors, m, n, k, integer, wide, tuning.gpu(a.device))
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    run_tile(out, a, b, scale_a, scale_b, bias, zero_point, column_sum, tile, processors)
    return out


def run_tile(
    out, a, b, scale_a, scale_b, bias, zero_point, column_sum, tile: Tile, processors: int
) -> None:
    """Write the product to `out` [M, N], contiguous, cut into `tile` on so many processors."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .kernel import scaled_mm_kernel

    (m, k), n = a.shape, b.shape[0]
    aligned = alignment(a, b, scale_a, scale_b, bias, zero_point, column_sum)
    # A weight that is mapped from a file may start anywhere.
    tma = tile.tma and aligned[0] and aligned[1]
    constants = (
        *(tile.block_m, tile.block_n, tile.block_k, tile.group_m),
        tma,
        a.dtype == torch.int8,
        scale_a.numel() > 1,
        scale_b.numel() > 1,
        bias is not None,
        zero_point is not None,
        tile.flatten,
    )
    arguments = (
        TensorDescriptor.from_tensor(a, [tile.block_m, tile.block_k]) if tma else a,
        TensorDescriptor.from_tensor(b, [tile.block_n, tile.block_k]) if tma else b,
        *(out, scale_a, scale_b, bias, zero_point, column_sum),
        *(m, n, k, a.stride(0), b.stride(0)),
        *constants,
    )
    types = (a.dtype, b.dtype, out.dtype, None if bias is None else bias.dtype)
    key = (*constants, aligned, types, n % ALIGNMENT, n == 1)
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    launch(
        scaled_mm_kernel,
        min(tiles, processors * tile.per_sm),
        arguments,
        {"num_warps": tile.warps, "num_stages": tile.stages},
        key,
        a.device,
    )


def _register(scheme: str, least: tuple[int, int]) -> None:
    needs = Needs(
        frozenset({scheme}),
        devices=frozenset({"cuda"}),
        capability=least,
        package="triton.tools.tensor_descriptor",
    )
    register(Backend(OP, "triton", 10, needs, run))


_register("int8", (8, 0))
# Triton has no FP8 types below.
_register("fp8", (8, 9))
