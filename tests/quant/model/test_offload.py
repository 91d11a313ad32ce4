"""diffusers' group offloading of quantized models; a CPU alone moves everything to where it is."""

import accelerate
import pytest
import torch

import lowbit
from lowbit.ops.linear.weight import Weight

CPU = torch.device("cpu")
WAYS = [
    {"offload_type": "leaf_level"},
    {"offload_type": "block_level", "num_blocks_per_group": 1},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["offload_type"])
@pytest.mark.parametrize("name", ["int8_convrot", "nvfp4"])
def test_model_that_is_moved_group_by_group_computes_the_same(model, run, name, way):
    model.bfloat16()
    lowbit.quantize_model(model, name)
    want = run(model, torch.bfloat16)
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **way)
    assert torch.equal(run(model, torch.bfloat16), want)
    assert any(type(p) is Weight for p in model.parameters())


def test_offloading_to_disk_is_refused(model, tmp_path):
    model.bfloat16()
    lowbit.quantize_model(model, "int8_convrot")
    options = {"offload_device": CPU, "offload_to_disk_path": str(tmp_path)}
    with pytest.raises(TypeError, match="offloading is to memory, not to disk"):
        model.enable_group_offload(onload_device=CPU, **WAYS[0], **options)


def test_offloading_weight_by_weight_is_refused_with_what_to_use_instead(model):
    """As diffusers' enable_sequential_cpu_offload does."""
    model.bfloat16()
    lowbit.quantize_model(model, "int8_convrot")
    with pytest.raises(TypeError, match="use enable_group_offload or enable_model_cpu_offload"):
        accelerate.cpu_offload(model, execution_device=CPU)


def test_model_that_is_moved_as_a_whole_computes_the_same(model, run):
    """As diffusers' enable_model_cpu_offload does."""
    model.bfloat16()
    lowbit.quantize_model(model, "int8_convrot")
    want = run(model, torch.bfloat16)
    moved, hook = accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    assert torch.equal(run(moved, torch.bfloat16), want)
    hook.offload()
