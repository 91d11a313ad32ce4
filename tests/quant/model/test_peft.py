"""LoRAs that diffusers loads through PEFT, beside quantized weights."""

import copy

import pytest
import torch
import torch._dynamo as dynamo

import lowbit
from lowbit.ops.linear.modules import LowBitLinear
from lowbit.quant import formats
from tests.quant.model.conftest import only_wan

RANK = 4


def adapter(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA for every linear layer of the blocks."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks." in name:
            down = torch.randn(RANK, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, RANK, generator=generator)
            state[f"{name}.lora_A.weight"] = down * layer.in_features**-0.5
            state[f"{name}.lora_B.weight"] = up * 0.3
    return state


def difference(a, b) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


@pytest.fixture(params=["int8_convrot", "nvfp4"])
def pair(model, request):
    """A model in 16 bits and the same quantized, each with a LoRA; the format."""
    dense = model.bfloat16()
    quantized = copy.deepcopy(dense)
    lowbit.quantize_model(quantized, request.param)
    state = adapter(model)
    for one in (dense, quantized):
        one.load_lora_adapter(dict(state), prefix=None, adapter_name="a")
    return dense, quantized, formats.get(request.param)


def test_lora_acts_beside_the_quantized_weights(pair, run):
    dense, quantized, fmt = pair
    bases = [m for m in quantized.modules() if isinstance(m, LowBitLinear)]
    before = [m.weight._qdata.clone() for m in bases]
    results = {}
    for strength in (1.0, 0.5):
        for model in (dense, quantized):
            model.set_adapters(["a"], [strength])
        results[strength] = run(dense, torch.bfloat16), run(quantized, torch.bfloat16)
    for model in (dense, quantized):
        model.disable_lora()
    results[0.0] = run(dense, torch.bfloat16), run(quantized, torch.bfloat16)
    plain = difference(*reversed(results[0.0]))
    for want, got in (results[1.0], results[0.5]):
        # Of the size of the error without it, and far below what the LoRA does.
        assert difference(got, want) < 2 * plain < 4 * fmt.max_error
        assert difference(want, results[0.0][0]) > 2 * difference(got, want)
    assert difference(results[1.0][1], results[0.5][1]) > plain
    assert all(torch.equal(m.weight._qdata, b) for m, b in zip(bases, before, strict=True))


@only_wan
def test_taken_off_nothing_is_left(model, run):
    model.bfloat16()
    lowbit.quantize_model(model, "int8_convrot")
    want = run(model, torch.bfloat16)
    model.load_lora_adapter(adapter(model), prefix=None, adapter_name="a")
    assert not torch.equal(run(model, torch.bfloat16), want)
    model.unload_lora()
    assert torch.equal(run(model, torch.bfloat16), want)


@only_wan
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_refused_before_anything_is_merged(model, run, safe):
    """Recipe `auto` keeps dense layers, into which PEFT would merge before it meets ours."""
    model.bfloat16()
    done = lowbit.quantize_model(model, "int8_convrot", keep=[r"blocks\.0\.attn1"])
    plain = run(model, torch.bfloat16)
    model.load_lora_adapter(adapter(model), prefix=None, adapter_name="a")
    want = run(model, torch.bfloat16)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(TypeError, match=r"nothing was merged.*merge before quantizing"):
            one.fuse_lora(safe_fusing=safe)
        assert torch.equal(run(one, torch.bfloat16), want)
    model.unload_lora()
    assert torch.equal(run(model, torch.bfloat16), plain)
    done.undo()
    model.load_lora_adapter(adapter(model), prefix=None, adapter_name="a")
    model.fuse_lora(safe_fusing=safe)


@only_wan
@pytest.mark.parametrize("safe", [False, True])
def test_merge_that_stopped_halfway_can_be_taken_back(model, safe):
    lowbit.quantize_model(model, "int8_convrot", keep=[r"blocks\.0\.attn1"])
    model.load_lora_adapter(adapter(model), prefix=None, adapter_name="a")
    kept = model.blocks[0].attn1.to_q.base_layer.weight
    want = kept.detach().clone()
    with pytest.raises(TypeError, match=r"merge before quantizing.*unfuse_lora\(\)"):
        # As those do who ask PEFT itself.
        type(model).fuse_lora(model, safe_fusing=safe)
    assert difference(kept, want) > 0.01
    model.unfuse_lora()
    assert not any(getattr(layer, "merged", False) for layer in model.modules())
    # Added and subtracted again, rounded both times.
    assert difference(kept, want) < 2 * torch.finfo(torch.float32).eps


@only_wan
def test_saving_is_refused_until_it_is_taken_off(model, run, tmp_path):
    done = lowbit.quantize_model(model, "int8_convrot")
    state = adapter(model)
    model.load_lora_adapter(dict(state), prefix=None, adapter_name="a")
    want, path = run(model), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="a LoRA is no part of the file: take it off first"):
        lowbit.save_model(model, path)
    with pytest.raises(RuntimeError, match="replaced again"):
        done.undo()
    assert not path.exists()
    model.unload_lora()
    lowbit.save_model(model, path)
    again = lowbit.load_model(path, dtype=torch.float32)
    again.load_lora_adapter(dict(state), prefix=None, adapter_name="a")
    assert torch.equal(run(again), want)


@only_wan
@pytest.mark.parametrize("name", ["int8_convrot", "fp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_blocks_with_a_lora_compile_to_one_graph(model, run, name, backend):
    model.bfloat16()
    lowbit.quantize_model(model, name)
    model.load_lora_adapter(adapter(model), prefix=None, adapter_name="a")
    want = run(model, torch.bfloat16)
    dynamo.reset()
    dynamo.utils.counters.clear()
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    with dynamo.config.patch(error_on_recompile=True):
        got = run(model, torch.bfloat16)
    # Outside eager, chains of bf16 operations are rounded where the graph says.
    allowed = 0 if backend == "eager" else 4 * torch.finfo(torch.bfloat16).eps
    assert difference(got, want) <= allowed
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.utils.counters["graph_break"]
