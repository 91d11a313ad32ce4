"""Layers as other programs write them, made from our own: what `quant/dialects` has to undo."""

import torch
from comfy_kitchen.float_utils import from_blocked, swap_nibbles, to_blocked

from lowbit.quant import formats

GROUPS = {"nvfp4": 16, "mxfp8": 32}
GLOBAL_RANGE = 2688.0


def patterned(rows=256, columns=1024, seed=0):
    """A weight with rows and columns of different size, as trained ones have."""
    noise = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=noise)
    sizes = torch.randn(rows, 1, generator=noise) + torch.randn(1, columns, generator=noise)
    return values * (0.3 * sizes).exp()


def even(rows=256, columns=1024, seed=0):
    """A weight that shows no order of its scales."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def with_structure(kind, rows=1024, columns=1024, seed=0):
    """A weight whose scales, in the right order, show rows and columns in a wrong one."""
    values = even(rows, columns, seed)
    if kind == "diagonal":
        return values / 32 + torch.eye(rows, columns)
    if kind == "blocks":
        return values * torch.block_diag(*[torch.ones(128, 128)] * (rows // 128))
    sizes = torch.randn(rows // 128, columns // 128, generator=torch.Generator().manual_seed(seed))
    return values * (0.6 * sizes).exp().repeat_interleave(128, 0).repeat_interleave(128, 1)


def packed(format_name, weight):
    """The tensors of a layer in ComfyUI's layout, without a marking."""
    fmt = formats.get(format_name)
    return fmt.pack(fmt.quantize(weight))


def flat_scales(format_name, weight, parts):
    """The block scales of `parts`, [N, K / group], one after the other."""
    rows, columns = weight.shape[0], weight.shape[1] // GROUPS[format_name]
    scale = parts["weight_scale"]
    codes = from_blocked(scale.view(torch.uint8), rows, columns).contiguous()
    fmt = formats.get(format_name)
    return codes.view(fmt.scale_dtypes["weight_scale"])


def modelopt(weight, format_name="nvfp4"):
    """A layer as ModelOpt exports it, of rows that need no padding in its payload."""
    parts = packed(format_name, weight)
    parts["weight"] = parts["weight"][: weight.shape[0]]
    parts["weight_scale"] = flat_scales(format_name, weight, parts)
    if format_name == "nvfp4":
        parts["weight"] = swap_nibbles(parts["weight"])
        parts["input_scale"] = torch.tensor(0.01)
    return parts


def lightx2v(weight, calibrated=True):
    """A layer as LightX2V writes it, after or before its calibration."""
    parts = packed("nvfp4", weight)
    tensor_scale = parts.pop("weight_scale_2")
    absmax = torch.tensor(5.0)
    parts["weight"] = swap_nibbles(parts["weight"][: weight.shape[0]])
    global_scale = 1 / tensor_scale
    if not calibrated:
        return parts | {"weight_global_scale": global_scale, "input_absmax": absmax}
    input_global_scale = GLOBAL_RANGE / absmax
    alpha = 1 / (input_global_scale * global_scale)
    return parts | {"alpha": alpha, "input_global_scale": input_global_scale}


def twice(parts):
    """The parts with their scales swizzled once more."""
    scale = parts["weight_scale"]
    codes = to_blocked(scale.view(torch.uint8).reshape(scale.shape), flatten=False)
    return {**parts, "weight_scale": codes.view(scale.dtype)}


def tiled(weight, tile, dtype=torch.float8_e4m3fn):
    """(payload, scale [N / tile, K / tile]) of convert_to_quant's blockwise formats."""
    n, k = weight.shape
    tiles = weight.reshape(n // tile, tile, k // tile, tile)
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = tiles.abs().amax((1, 3)) / limit
    stored = tiles / scale[:, None, :, None]
    stored = stored.round() if dtype == torch.int8 else stored
    return stored.to(dtype).reshape(n, k), scale
