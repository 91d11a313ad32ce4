"""Files as others write them, made from a small Wan: legacy FP8, marked FP8, diffusers' names."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lowbit.quant import formats
from lowbit.quant.checkpoint.stored import marker_tensor
from tests.checkpoints import write_wan

BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(?:self_attn|cross_attn|ffn)\.\w+\.weight")
DIFFUSERS = (
    (r"^text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"^time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"^time_projection\.1", "condition_embedder.time_proj"),
    (r"^head\.modulation", "scale_shift_table"),
    (r"^head\.head", "proj_out"),
    (r"modulation$", "scale_shift_table"),
    (r"self_attn\.", "attn1."),
    (r"cross_attn\.", "attn2."),
    (r"\.([qkv])\.", r".to_\1."),
    (r"\.o\.", ".to_out.0."),
    (r"\.norm3\.", ".norm2."),
    (r"ffn\.0\.", "ffn.net.0.proj."),
    (r"ffn\.2\.", "ffn.net.2."),
)


def wan_tensors(folder: Path, **options) -> dict[str, torch.Tensor]:
    """Return the tensors of a small Wan with one block."""
    path = folder / "source.safetensors"
    write_wan(path, **{"dim": 256, "ffn": 512, "layers": 1, **options})
    return load_file(path)


def linear_names(tensors) -> list[str]:
    """Return the module names of the linear layers in blocks."""
    weights = [n for n, t in tensors.items() if BLOCK_LINEAR.fullmatch(n) and t.ndim == 2]
    return [name.removesuffix(".weight") for name in weights]


def legacy_fp8(tensors, scale_dtype=torch.float32, flag: bool = True) -> dict[str, torch.Tensor]:
    """Return FP8 as the host used to write it; bfloat16 scales as WanVideoWrapper casts them."""
    result = dict(tensors)
    for name in linear_names(tensors):
        packed = formats.get("fp8_e4m3").pack(
            formats.get("fp8_e4m3").quantize(tensors[f"{name}.weight"])
        )
        result[f"{name}.weight"] = packed["weight"]
        result[f"{name}.scale_weight"] = packed["weight_scale"].to(scale_dtype)
        result[f"{name}.scale_input"] = torch.ones((), dtype=scale_dtype)
    if flag:
        result["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    return result


def marked(tensors, format_name: str) -> dict[str, torch.Tensor]:
    """Return the blocks' linear layers in a format, with `comfy_quant`."""
    fmt, result = formats.get(format_name), dict(tensors)
    for name in linear_names(tensors):
        packed = fmt.pack(fmt.quantize(tensors[f"{name}.weight"]))
        result |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        result[f"{name}.comfy_quant"] = marker_tensor(fmt.marker)
    return result


def diffusers_named(tensors) -> dict[str, torch.Tensor]:
    """Return the tensors under diffusers' names."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def sharded(folder: Path, tensors, shards: int = 3) -> Path:
    """Write `tensors` as a folder of shards with an index and return the folder."""
    folder.mkdir()
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def saved(path: Path, tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write `tensors` to `path` and return it."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path
