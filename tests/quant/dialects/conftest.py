"""Layers of other programs as files, and what comes of them."""

import pytest
import torch
from safetensors.torch import save_file

from lowbit.quant import formats
from lowbit.quant.checkpoint import Checkpoint
from lowbit.quant.checkpoint.stored import marker_tensor


@pytest.fixture
def opened(tmp_path):
    """A function (layer → parts, metadata) -> an open Checkpoint that holds them."""

    def write(layers, metadata=None) -> Checkpoint:
        tensors = {
            f"{name}.{part}": tensor.contiguous().clone()
            for name, parts in layers.items()
            for part, tensor in parts.items()
        }
        path = tmp_path / "a file.safetensors"
        save_file(tensors, path, metadata)
        return Checkpoint(path)

    return write


def marked(name, parts):
    """The parts with the marking of a format."""
    return parts | {"comfy_quant": marker_tensor(formats.get(name).marker)}


def same_bits(parts, want):
    assert {n: t.dtype for n, t in parts.items()} == {n: t.dtype for n, t in want.items()}
    for name, tensor in want.items():
        got = parts[name]
        assert got.shape == tensor.shape, name
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def repacked(layer, checkpoint):
    """The layer's tensors as they would be written, without the scales of its input."""
    return layer.format.pack(layer.load(checkpoint))
