"""Weights on which quantizers of blocks are compared, and comfy-kitchen's results on them."""

import torch
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops.kitchen import kitchen_eager
from lowbit.quant import formats

NAMES = ("nvfp4", "mxfp4", "mxfp8")
IN_KITCHEN = ("nvfp4", "mxfp8")
SHAPE = (48, 1024)


def made(kind: str, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    """Return a seeded weight [N, K], float32, of a kind of data."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(shape, generator=generator) * 0.02
    if kind == "heavy tails":
        weight /= torch.randn(3, *shape, generator=generator).square().mean(dim=0).sqrt()
    if kind == "outlier columns":
        weight[:, ::97] *= 20
    if kind == "rows and columns of their own":
        n, k = shape
        weight *= torch.randn(n, 1, generator=generator).mul(0.5).exp()
        weight *= torch.randn(1, k, generator=generator).mul(0.5).exp()
    if kind == "one huge value":
        weight[5, 7] = 1e4
    if kind == "tiny":
        weight *= 2.0**-90
    return weight


KINDS = (
    "gaussian",
    "heavy tails",
    "outlier columns",
    "rows and columns of their own",
    "one huge value",
    "tiny",
)


def others(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the values of comfy-kitchen's quantizer; of MXFP4, by its rule of MXFP8's scales."""
    fmt = formats.get(name)
    with kitchen_eager():
        if name in IN_KITCHEN:
            return QuantizedTensor.from_float(weight, fmt.layout.kitchen_layout).dequantize()
    blocks = weight.view(-1, fmt.group)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(largest / fmt.max)))
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = (blocks.abs() / scale).unsqueeze(-1).sub(grid).abs().argmin(dim=-1)
    return (grid[nearest] * scale * blocks.sign()).view_as(weight)
