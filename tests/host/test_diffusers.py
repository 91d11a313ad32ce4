"""Files that `save_model` writes from diffusers models, in a real ComfyUI."""

import pytest
import torch

import lowbit
from lowbit.nodes.inputs import AS_STORED
from lowbit.quant import formats
from lowbit.quant.demo.models import weights
from tests.host import graphs

FORMATS = ["int8_convrot", "nvfp4"]
# The host takes the width of Wan from the file, but not that of its texts.
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "ffn_dim": 512,
    "num_layers": 2,
    "text_dim": 4096,
}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def files(comfy) -> dict[str, str]:
    """Names under which the loaders list one diffusers model: dense, and in each format."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = diffusers.WanTransformer3DModel(**CONFIG).requires_grad_(False)
    model.load_state_dict(weights(model, seed=0))
    model.bfloat16()
    names = {"dense": "diffusers.safetensors"}
    lowbit.save_model(model, comfy.model_path(names["dense"]))
    for name in FORMATS:
        names[name] = f"diffusers_{name}.safetensors"
        with lowbit.quantize_model(model, name):
            lowbit.save_model(model, comfy.model_path(names[name]))
    return names


@pytest.mark.parametrize("name", FORMATS)
def test_saved_model_samples_in_the_stock_loader_and_in_ours(sample, files, name):
    dense = sample(lambda graph: graphs.load(graph, files["dense"]))
    stock = sample(lambda graph: graphs.load(graph, files[name]))
    ours = sample(lambda graph: graphs.load_lowbit(graph, files[name], AS_STORED))
    # Two blocks, weights and activations, as in test_nodes.py.
    bound = 2**0.5 * 2 * formats.get(name).max_error
    assert 0 < difference(ours, dense) < bound
    assert 0 < difference(stock, dense) < bound
    # It is the file that is quantized in the host as well.
    again = sample(lambda graph: graphs.load_lowbit(graph, files["dense"], name))
    assert torch.equal(again, ours)
