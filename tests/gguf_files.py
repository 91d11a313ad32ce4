"""GGUF files as ComfyUI-GGUF's converter makes them, written from tensors."""

import gguf
import numpy as np
import torch

# What gguf's own quantizer can write, and blocks that it only reads, made of random bits.
WRITTEN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16")
RANDOM = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Where the float16 factors of a block lie, in bytes.
FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
BLOCK = 256


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """[rows, bytes] of blocks whose factors are small finite numbers."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    noise = np.random.default_rng(seed)
    blocks = noise.integers(0, 256, (rows * columns // BLOCK, size), dtype=np.uint8)
    for at in FACTORS[kind]:
        factor = noise.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = factor[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path, tensors: dict[str, torch.Tensor], kind: str = "Q8_0", arch: str = "wan"):
    """Write `tensors`, the two-dimensional ones in `kind`, the rest in F32, and return `path`.

    Matrices whose rows are no multiple of 256 are reshaped, with their true shape recorded.
    """
    writer = gguf.GGUFWriter(path, arch)
    for name, tensor in tensors.items():
        data = tensor.float().numpy()
        if data.ndim != 2:
            writer.add_tensor(name, data)
            continue
        if data.shape[1] % BLOCK and data.size % BLOCK == 0:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in data.shape])
            data = data.reshape(-1, BLOCK)
        if kind in RANDOM:
            packed = random_blocks(kind, *data.shape)
        else:
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
