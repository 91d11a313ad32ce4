"""Weights that all blocks of a model lack: another program packed them under other names."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.quant.inspect_file import inspect_file
from lowbit.quant.inspect_problems import BOTH
from tests.checkpoints import qwen_image_shapes, write_wan

# Qwen-Image is nowhere narrower; only the names matter here.
NARROW = 64


def wan(path):
    return load_file(write_wan(path, layers=2))


def qwen_image(path):
    shapes = qwen_image_shapes(layers=1)
    return {n: torch.zeros([min(size, NARROW) for size in shape]) for n, shape in shapes.items()}


def other_transformer(path):
    parts = {"attn.to_q.weight": (64, 64), "attn.norm.weight": (64,), "attn.to_q.bias": (64,)}
    tensors = {"img_in.weight": torch.zeros(64, 64)}
    for i in range(2):
        tensors |= {f"double_blocks.{i}.{name}": torch.zeros(s) for name, s in parts.items()}
    return tensors


def problems(path, tensors):
    save_file(tensors, path)
    return inspect_file(str(path)).problems


@pytest.mark.parametrize(
    ("make", "first", "detail"),
    [
        (wan, "blocks.0.ffn.0.weight", " is missing; what is there is called bias, qweight"),
        (
            qwen_image,
            "transformer_blocks.0.attn.to_q.weight",
            " is missing; what is there is called bias, qweight",
        ),
        (
            other_transformer,
            "no block has a matrix called weight",
            "; its tensors are called bias, qweight, weight",
        ),
    ],
)
def test_weights_that_all_blocks_lack_are_an_error(tmp_path, make, first, detail):
    path = tmp_path / "m.safetensors"
    tensors = make(path)
    assert not problems(path, tensors)
    packed = {
        n.replace(".weight", ".qweight") if "blocks." in n and t.dim() == 2 else n: t
        for n, t in tensors.items()
    }
    (problem,) = problems(path, packed)
    assert (problem.code, problem.affects) == ("incomplete", BOTH)
    assert problem.detail == first + detail
