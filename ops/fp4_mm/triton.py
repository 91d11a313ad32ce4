"""The Triton backend of `fp4_mm`: few tokens by a kernel that decodes, many by a decoded weight."""

import torch

from .. import tuning
from ..decode_fp4 import decode_fp4
from ..decode_fp4.triton import WORD, words
from ..launch import ALIGNMENT, TRITON_MIN, alignment, dependent, launch
from ..registry import Backend, Needs, register
from ..scaled_mm import tiles
from ..scaled_mm.triton import processors_of
from ..scaled_mm.triton import run_tile as run_product
from . import OP, scheme_of
from .choice import Tile, choose

SUM_BLOCK = 1024


def run(x, packed, scale, tensor_scale, bias, n, group) -> torch.Tensor:
    """Return the product as `fp4_mm` describes it, for 16-bit activations."""
    scheme = scheme_of(group, x.dtype)
    tile = choose(tuning.gpu(x.device), scheme, x.shape[0], n, x.shape[1], group)
    return run_by(tile, x, packed, scale, tensor_scale, bias, n, group)


def run_by(tile, x, packed, scale, tensor_scale, bias, n, group) -> torch.Tensor:
    """Return the product as `fp4_mm` describes it, by a `Tile`, or by one for a decoded weight."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if isinstance(tile, Tile):
        return run_tile(x, packed, scale, tensor_scale, n, group, bias, tile)
    weight = decode_fp4(packed, scale, (n, x.shape[1]), group, x.dtype)
    return multiply(x, weight, tensor_scale, bias, tile)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    tile: tiles.Tile,
) -> torch.Tensor:
    """Return tensor_scale · (x · Wᵀ) + bias for a decoded weight [N, K'], columns from K on 0."""
    (m, k), (n, columns) = x.shape, weight.shape
    if columns > k or x.stride(0) % ALIGNMENT:
        x = torch.nn.functional.pad(x, (0, columns - k)).contiguous()
    one = torch.ones(1, device=x.device)
    out = x.new_empty(m, n)
    scale = one if tensor_scale is None else tensor_scale.reshape(1)
    run_product(out, x, weight, one, scale, bias, None, None, tile, processors_of(x.device))
    return out


def run_tile(x, packed, scale, tensor_scale, n, group, bias, tile: Tile) -> torch.Tensor:
    """Return the product as `fp4_mm` describes it, cut into `tile`; rows of x are contiguous."""
    from .kernel import add_splits_kernel, fp4_mm_kernel

    (m, k), columns = x.shape, 2 * packed.shape[1]
    scale = words(scale)
    early = dependent(x.device)
    out = x.new_empty(m, n)
    split = tile.splits > 1
    target = x.new_empty(tile.splits, m, n, dtype=torch.float32) if split else out
    scaling = (None, None) if split else (tensor_scale, bias)
    tensors = (x, packed, scale, *scaling, target)
    row_words = -(-columns // group // WORD)
    sizes = (m, n, k, columns, row_words, x.stride(0))
    ragged = -(-k // group) != row_words * WORD
    constants = (group, tile.block_m, tile.block_n, tile.block_k, tile.splits, ragged, bool(early))
    divisible = tuple((size % ALIGNMENT == 0, size == 1) for size in sizes[1:])
    types = (x.dtype, None if bias is None else bias.dtype)
    key = (types, alignment(*tensors), divisible, constants)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **early}
    programs = -(-m // tile.block_m) * -(-n // tile.block_n) * tile.splits
    launch(fp4_mm_kernel, programs, (*tensors, *sizes, *constants), options, key, x.device)
    if split:
        tensors = (target, tensor_scale, bias, out)
        arguments = (*tensors, m * n, n, tile.splits, SUM_BLOCK, bool(early))
        key = (types, alignment(*tensors), n % ALIGNMENT == 0, n == 1, tile.splits)
        launch(add_splits_kernel, -(-m * n // SUM_BLOCK), arguments, dict(early), key, x.device)
    return out


register(
    Backend(
        OP,
        "triton",
        10,
        Needs(
            frozenset({"nvfp4_16", "mxfp4_16"}),
            devices=frozenset({"cuda"}),
            capability=(8, 0),
            package="triton.tools.tensor_descriptor",
            package_min=TRITON_MIN,
        ),
        run,
    )
)
