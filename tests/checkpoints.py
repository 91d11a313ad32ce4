"""Small checkpoints with random weights and the keys by which ComfyUI recognises a model.

Every tensor depends on its name and the seed alone, so a file is the same on every machine with the
same torch, and a model with more layers begins with the tensors of a smaller one. Tensors are
written one at a time: a Qwen-Image layer (761 MB in bf16) never lies in memory whole.

The weights keep activations near 1: Linear ~ N(0, 1/sqrt(K)), norms ~ 1, biases and modulation
small, gates ~ 1 so that what a block computes, and its error, shows in the output. Two input
channels of every Linear are OUTLIER_WEIGHT times larger, and two channels of every block's
modulation scale the activations by about 1 + OUTLIER_SCALE, as trained models have them.
"""

import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

OUTLIER_WEIGHT = 4.0
OUTLIER_SCALE = 4.0
# first of attention, then of the FFN
MODULATION = ("shift", "scale", "gate") * 2
HEAD_SIZE = 128
WAN_TEXT_DIM = 4096
WAN_IMAGE_DIM = 1280
QWEN_DIM = 3072
QWEN_TEXT_DIM = 3584
LATENT_CHANNELS = 16
# an I2V model sees the noise, the image's latent and a 4-channel mask
WAN_I2V_CHANNELS = 2 * LATENT_CHANNELS + 4
# VACE's own input: a video's latent in two parts, and a mask of 64 channels
WAN_VACE_CHANNELS = 2 * LATENT_CHANNELS + 64
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Shapes = dict[str, tuple[int, ...]]


def write_wan(
    path: Path,
    *,
    dim: int = 256,
    ffn: int = 512,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    variant: str = "t2v",
) -> Path:
    """Write a Wan 2.1 transformer with dim / 128 heads and return `path`.

    variant: "t2v", "i2v" (36 input channels, image embedding, k_img and v_img) or "vace" (one more
    block, beside the first).
    Raises ValueError if `dim` is not a multiple of 128 or `variant` is unknown.
    """
    if dim % HEAD_SIZE:
        raise ValueError(f"dim={dim} is not a multiple of {HEAD_SIZE}")
    if variant not in ("t2v", "i2v", "vace"):
        raise ValueError(f"variant={variant!r}: choose 't2v', 'i2v' or 'vace'")
    return _write(path, wan_shapes(dim, ffn, layers, variant), dtype, seed)


def write_qwen_image(
    path: Path, *, layers: int = 1, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write a Qwen-Image transformer of full width (the host allows no other); return `path`."""
    return _write(path, qwen_image_shapes(layers), dtype, seed)


def write_lora(
    path: Path, model_path: Path, *, rank: int = 4, seed: int = 0, size: float = 0.3
) -> Path:
    """Write a LoRA for every Linear in the blocks of `model_path` and return `path`.

    The delta's effect is about size * sqrt(rank) of the layer's own output. Keys follow the generic
    naming that LoraLoaderModelOnly takes for every model: diffusion_model.<layer>.lora_A.weight.
    """
    shapes: Shapes = {}
    with safe_open(str(model_path), "pt") as model:
        for key in model.keys():  # noqa: SIM118  safe_open is not iterable
            shape = model.get_slice(key).get_shape()
            if "blocks." in key and key.endswith(".weight") and len(shape) == 2:
                N, K = shape
                layer = "diffusion_model." + key.removesuffix(".weight")
                shapes[layer + ".lora_A.weight"] = (rank, K)
                shapes[layer + ".lora_B.weight"] = (N, rank)
    return _write(path, shapes, torch.bfloat16, seed, lora_size=size)


def wan_shapes(dim: int, ffn: int, layers: int, variant: str) -> Shapes:
    """The names and shapes of a Wan 2.1 transformer's tensors."""
    image = variant == "i2v"
    channels = WAN_I2V_CHANNELS if image else LATENT_CHANNELS
    shapes: Shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2)}
    shapes["patch_embedding.bias"] = (dim,)
    shapes |= _linear("text_embedding.0", dim, WAN_TEXT_DIM)
    shapes |= _linear("text_embedding.2", dim, dim)
    shapes |= _linear("time_embedding.0", dim, 256)
    shapes |= _linear("time_embedding.2", dim, dim)
    shapes |= _linear("time_projection.1", 6 * dim, dim)
    for i in range(layers):
        shapes |= _wan_block(f"blocks.{i}.", dim, ffn, image)
    if variant == "vace":
        shapes["vace_patch_embedding.weight"] = (dim, WAN_VACE_CHANNELS, 1, 2, 2)
        shapes["vace_patch_embedding.bias"] = (dim,)
        shapes |= _wan_block("vace_blocks.0.", dim, ffn, image)
        shapes |= _linear("vace_blocks.0.before_proj", dim, dim)
        shapes |= _linear("vace_blocks.0.after_proj", dim, dim)
    shapes["head.modulation"] = (1, 2, dim)
    shapes |= _linear("head.head", 4 * LATENT_CHANNELS, dim)
    if image:
        shapes |= _norm("img_emb.proj.0", WAN_IMAGE_DIM, bias=True)
        shapes |= _linear("img_emb.proj.1", WAN_IMAGE_DIM, WAN_IMAGE_DIM)
        shapes |= _linear("img_emb.proj.3", dim, WAN_IMAGE_DIM)
        shapes |= _norm("img_emb.proj.4", dim, bias=True)
    return shapes


def qwen_image_shapes(layers: int) -> Shapes:
    """The names and shapes of a Qwen-Image transformer's tensors."""
    shapes: Shapes = _linear("img_in", QWEN_DIM, 4 * LATENT_CHANNELS)
    shapes |= _norm("txt_norm", QWEN_TEXT_DIM)
    shapes |= _linear("txt_in", QWEN_DIM, QWEN_TEXT_DIM)
    shapes |= _linear("time_text_embed.timestep_embedder.linear_1", QWEN_DIM, 256)
    shapes |= _linear("time_text_embed.timestep_embedder.linear_2", QWEN_DIM, QWEN_DIM)
    for i in range(layers):
        shapes |= _qwen_block(f"transformer_blocks.{i}.")
    shapes |= _linear("norm_out.linear", 2 * QWEN_DIM, QWEN_DIM)
    shapes |= _linear("proj_out", 4 * LATENT_CHANNELS, QWEN_DIM)
    return shapes


def _wan_block(block: str, dim: int, ffn: int, image: bool) -> Shapes:
    shapes: Shapes = {block + "modulation": (1, 6, dim)}
    for attention in ("self_attn", "cross_attn"):
        for layer in "qkvo":
            shapes |= _linear(f"{block}{attention}.{layer}", dim, dim)
        shapes |= _norm(f"{block}{attention}.norm_q", dim)
        shapes |= _norm(f"{block}{attention}.norm_k", dim)
    if image:
        shapes |= _linear(block + "cross_attn.k_img", dim, dim)
        shapes |= _linear(block + "cross_attn.v_img", dim, dim)
        shapes |= _norm(block + "cross_attn.norm_k_img", dim)
    shapes |= _norm(block + "norm3", dim, bias=True)
    shapes |= _linear(block + "ffn.0", ffn, dim)
    shapes |= _linear(block + "ffn.2", dim, ffn)
    return shapes


def _qwen_block(block: str) -> Shapes:
    shapes: Shapes = {}
    for stream in ("img", "txt"):
        shapes |= _linear(f"{block}{stream}_mod.1", 6 * QWEN_DIM, QWEN_DIM)
        shapes |= _linear(f"{block}{stream}_mlp.net.0.proj", 4 * QWEN_DIM, QWEN_DIM)
        shapes |= _linear(f"{block}{stream}_mlp.net.2", QWEN_DIM, 4 * QWEN_DIM)
    image_layers = ("to_q", "to_k", "to_v", "to_out.0")
    text_layers = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for layer in image_layers + text_layers:
        shapes |= _linear(f"{block}attn.{layer}", QWEN_DIM, QWEN_DIM)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        shapes |= _norm(f"{block}attn.{norm}", HEAD_SIZE)
    return shapes


def _linear(name: str, N: int, K: int) -> Shapes:
    return {name + ".weight": (N, K), name + ".bias": (N,)}


def _norm(name: str, width: int, bias: bool = False) -> Shapes:
    return {name + ".weight": (width,)} | ({name + ".bias": (width,)} if bias else {})


def _write(
    path: Path, shapes: Shapes, dtype: torch.dtype, seed: int, lora_size: float | None = None
) -> Path:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    # safetensors aligns the data to 8 bytes with spaces after the JSON
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in _values(shapes, seed, lora_size):
            file.write(values.to(dtype).contiguous().view(torch.uint8).numpy().data)
    return Path(path)


def _values(shapes: Shapes, seed: int, lora_size: float | None) -> Iterator[torch.Tensor]:
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        noise = torch.randn(shape, generator=generator)
        if lora_size is not None:
            yield noise * (lora_size if ".lora_B." in name else shape[1] ** -0.5)
        else:
            yield _scaled(name, noise)


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Turn noise ~ N(0, 1) into the values of the tensor `name`."""
    if name.endswith("modulation"):
        values = noise * 0.1
        if values.shape[1] == len(MODULATION):
            _modulate(values[0])
        return values
    if noise.ndim == 1:
        values = noise * 0.05 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if name.endswith("_mod.1.bias"):
            _modulate(values.view(len(MODULATION), -1))
        return values
    K = math.prod(noise.shape[1:])
    noise *= K**-0.5
    if noise.ndim == 2:
        noise[:, _outliers(K)] *= OUTLIER_WEIGHT
    # the time-dependent part of the modulation stays small beside its constant part
    small = "time_projection" in name or "_mod." in name or "norm_out.linear" in name
    return noise * 0.2 if small else noise


def _modulate(rows: torch.Tensor) -> None:
    """Open the gates and put outliers into the scales of one block's modulation, in place.

    rows: [6, D], as `MODULATION` names them.
    """
    for row, role in zip(rows, MODULATION, strict=True):
        if role == "gate":
            row += 1
        elif role == "scale":
            row[_outliers(len(row))] = OUTLIER_SCALE


def _outliers(width: int) -> list[int]:
    return [3 % width, width // 2]
