"""Which tensors of a LoRA file a model takes, with a stand-in for ComfyUI's table of names."""

import logging
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowbit.nodes.host import lora as host_lora
from lowbit.quant.lora import LoraError

DIM = 16
PART = ("diffusion_model.blocks.0.qkv.weight", (0, 0, DIM))
SWAPPED = ("diffusion_model.head.weight", None, lambda t: t)


class Patcher:
    """What `_Source` asks of ComfyUI's ModelPatcher."""

    def __init__(self):
        self.model = nn.Module()
        self.model.diffusion_model = root = nn.Module()
        root.patch = nn.Conv3d(36, DIM, (1, 2, 2))
        root.blocks = nn.ModuleList([nn.Module()])
        root.blocks[0].qkv = nn.Linear(DIM, 3 * DIM)
        root.head = nn.Linear(DIM, DIM)

    def get_model_object(self, name):
        return self.model.get_submodule(name)


@pytest.fixture
def patcher(monkeypatch):
    names = {
        "transformer.blocks.0.to_q": PART,
        "transformer.proj_out": SWAPPED,
        "transformer.named.by.the.host": "diffusion_model.head.weight",
        "elsewhere": "clip.head.weight",
    }
    comfy, module = types.ModuleType("comfy"), types.ModuleType("comfy.lora")
    module.model_lora_keys_unet = lambda model, key_map: {**key_map, **names}
    comfy.lora = module
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.lora", module)
    return Patcher()


def lora(path, **layers):
    """A file with a pair for each layer: name in the file, dots as two underscores -> shape."""
    tensors = {}
    for name, (n, *inputs) in layers.items():
        name = name.replace("__", ".")
        tensors[f"{name}.lora_A.weight"] = torch.ones(4, *inputs)
        tensors[f"{name}.lora_B.weight"] = torch.ones(n, 4)
    save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("name", ["transformer__blocks__0__to_q", "transformer__proj_out"])
def test_part_of_a_fused_layer_is_refused(patcher, tmp_path, name):
    layers = {"head": (DIM, DIM), name: (DIM, DIM)}
    path = lora(tmp_path / "lora.safetensors", **layers)
    with pytest.raises(LoraError, match="ComfyUI's own LoRA loader"):
        host_lora._Source(patcher, path)


def test_layer_of_another_shape_is_left_out_with_one_warning(patcher, tmp_path, caplog):
    layers = {"patch": (DIM, 16, 1, 2, 2), "transformer__named__by__the__host": (DIM, DIM)}
    source = host_lora._Source(patcher, lora(tmp_path / "lora.safetensors", **layers))
    assert [name for name, _ in source.layers()] == ["head"]
    with caplog.at_level(logging.WARNING):
        source.warn_of_what_is_left_out()
    (record,) = caplog.records
    assert "patch.weight" in record.getMessage()


def test_file_of_which_nothing_fits_is_refused(patcher, tmp_path):
    path = lora(tmp_path / "lora.safetensors", patch=(DIM, 16, 1, 2, 2))
    with pytest.raises(
        LoraError, match=r"of another model: .*patch\.weight is \[16, 36, 1, 2, 2\]"
    ):
        host_lora._Source(patcher, path)


def test_for_a_part_of_the_sampling_nothing_is_left_to_the_host(patcher, tmp_path):
    """Norms, biases of layers without a LoRA, and whole layers; bare parameters never are."""
    root = patcher.model.diffusion_model
    root.norm, root.modulation = nn.LayerNorm(DIM), nn.Parameter(torch.zeros(1, 6, DIM))
    values = {name: torch.ones(DIM) for name in ("norm.diff", "norm.diff_b", "head.diff_b")}
    values |= {"modulation.diff": torch.ones(1, 6, DIM), "patch.diff": torch.ones(DIM, 36, 1, 2, 2)}
    names, path = {"norm.weight", "norm.bias", "patch.weight"}, tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.{n}": v for n, v in values.items()}, path)
    whole, part = (host_lora._Source(patcher, str(path), is_part) for is_part in (False, True))
    assert set(whole.patches()) == {*names, "head.bias"} and not list(whole.layers())
    assert set(whole.differences()) == {"modulation"}
    assert part.patches() == {} and set(part.differences()) == {*names, "modulation"}
    ((place, layer),) = part.layers()
    assert place == "head" and torch.equal(layer.bias, torch.ones(DIM))
    assert layer.down.shape == (0, DIM) and layer.up.shape == (DIM, 0)
