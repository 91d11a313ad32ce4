"""Which tensors of a LoRA file a model takes, with a stand-in for ComfyUI's table of names."""

import copy
import gc
import logging
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowbit.nodes.host import lora as host_lora
from lowbit.nodes.lora_terms import Difference, Lora, WithTerms
from lowbit.quant.lora import LoraError
from tests.nodes.test_lora_terms import DIM as WIDTH
from tests.nodes.test_lora_terms import Block, term

DIM = 16
PART = ("diffusion_model.blocks.0.qkv.weight", (0, 0, DIM))
SWAPPED = ("diffusion_model.head.weight", None, lambda t: t)


class Model(nn.Module):
    """What `Runner` asks of ComfyUI's BaseModel, and of its patcher."""

    def __init__(self, loras=None):
        super().__init__()
        self.diffusion_model, self.model_sampling = Block().requires_grad_(False), None
        self.current_patcher = None
        if loras is not None:
            models = [types.SimpleNamespace(model=each) for each in loras]
            get = {host_lora.KEY: models}.get
            self.current_patcher = types.SimpleNamespace(get_additional_models_with_key=get)


class Executor:
    """As the host's: calls `seen` with the model while the LoRAs are on it."""

    def __init__(self, model, seen):
        self.class_obj, self.seen = model, seen

    def __call__(self, x, *_, **__):
        return self.seen(self.class_obj.diffusion_model)


def of_one_layer(value: float) -> Lora:
    differences = {"modulation": Difference(torch.full((1, WIDTH), value))}
    return Lora({"ffn.0": term(WIDTH, (WIDTH,), 0)}, 1.0, (0.0, 1.0), differences)


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


@pytest.mark.parametrize("name", ["norm.diff", "norm.diff_b", "modulation.diff", "head.diff_b"])
@pytest.mark.parametrize("is_part", [False, True])
def test_difference_that_is_not_finite_is_refused(patcher, tmp_path, name, is_part):
    root = patcher.model.diffusion_model
    root.norm, root.modulation = nn.LayerNorm(DIM), nn.Parameter(torch.zeros(DIM))
    path = tmp_path / "lora.safetensors"
    save_file({f"diffusion_model.{name}": torch.full((DIM,), torch.nan)}, path)
    source = host_lora._Source(patcher, str(path), is_part)
    with pytest.raises(LoraError, match=rf"lora\.safetensors: diffusion_model\.{name} holds NaN"):
        _ = list(source.layers()), source.differences(), source.patches()


def test_what_a_dropped_model_had_is_not_kept():
    """The host copies the list of wrappers to a clone that gets a model of its own."""
    loras = (of_one_layer(1.0),)
    first, second, runner = Model(loras), Model(loras), host_lora.Runner(loras)
    for model in (first, second):
        view = runner.run(Executor(model, lambda root: root.ffn[0]), torch.zeros(1), None)
        assert isinstance(view, WithTerms)
    del view
    layer = second.diffusion_model.ffn[0]
    left = [weakref.ref(each) for each in (second, layer, layer.weight)]
    del model, second, layer
    gc.collect()
    assert [ref() for ref in left] == [None] * 3


def test_model_keeps_its_layers_and_sums_from_run_to_run():
    """Graphs of torch.compile know them by their identity."""
    loras = (of_one_layer(1.0),)
    models, runner = [Model(loras), Model(loras)], host_lora.Runner(loras)
    seen = [
        runner.run(Executor(model, lambda root: (root.ffn[0], root.modulation)), torch.ones(1), 0)
        for model in models * 2
    ]
    assert all(a is b for a, b in zip(seen[0], seen[2], strict=True))
    assert all(a is b for a, b in zip(seen[1], seen[3], strict=True))
    assert not any(a is b for a, b in zip(seen[0], seen[1], strict=True))


def test_models_on_two_gpus_run_side_by_side_with_their_own_loras():
    """Both by the first model's wrapper, in threads, with copies of the LoRAs."""
    loras = (of_one_layer(1.0),)
    models, runner = [Model(loras), Model(copy.deepcopy(loras))], host_lora.Runner(loras)
    models[1].diffusion_model.modulation.fill_(5.0)

    def run(model):
        executor = Executor(model, lambda root: root.modulation.mean().item())
        with torch.inference_mode():
            return {runner.run(executor, torch.zeros(1), None) for _ in range(200)}

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, models)) == [{1.0}, {6.0}]


def test_model_without_a_patcher_has_the_loras_of_the_wrapper():
    runner = host_lora.Runner((of_one_layer(1.0),))
    value = runner.run(Executor(Model(), lambda root: root.modulation), torch.zeros(1), None)
    assert (value == 1).all()
