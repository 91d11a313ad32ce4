"""NVFP4 and MX files in a real ComfyUI: whoever wrote them, what is said, what is refused."""

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import load_file, save_file

from lowbit.quant import arithmetic, formats
from lowbit.quant.checkpoint.stored import marker_tensor
from lowbit.quant.quantize_file import quantize_file
from tests.host import graphs
from tests.host.server import PromptError
from tests.host.test_nodes import difference, tolerance


@pytest.fixture
def tensors(comfy, wan):
    """A function format -> the tensors of the small Wan in it."""

    def run(name: str) -> dict[str, torch.Tensor]:
        target = comfy.model_path(f"blocks_{name}.safetensors")
        quantize_file(comfy.model_path(wan), target, name, overwrite=True)
        return load_file(target)

    return run


@pytest.fixture
def put(comfy):
    def write(name: str, tensors) -> str:
        save_file({n: t.contiguous() for n, t in tensors.items()}, comfy.model_path(name))
        return name

    return write


def by_kitchen(ours: dict[str, torch.Tensor], dense: dict[str, torch.Tensor]):
    """Return the same layers, quantized to NVFP4 by comfy-kitchen's own quantizer."""
    fmt = formats.get("nvfp4")
    result = dict(ours)
    for key in [n for n in ours if n.endswith(".weight_scale_2")]:
        layer = key.removesuffix(".weight_scale_2")
        weight = dense[f"{layer}.weight"].float()
        made = QuantizedTensor.from_float(weight, fmt.layout.kitchen_layout)
        result |= {f"{layer}.{p}": t for p, t in fmt.pack(made).items()}
    return result


def test_nvfp4_of_kitchen_and_ours_load_alike_and_ours_is_nearer(comfy, sample, wan, tensors, put):
    plain = sample(lambda graph: graphs.load(graph, wan))
    ours = tensors("nvfp4")
    theirs = by_kitchen(ours, load_file(comfy.model_path(wan)))
    assert any(not torch.equal(ours[n], theirs[n]) for n in ours)
    wrong = {}
    for name, state in {"ours": ours, "kitchen": theirs}.items():
        file = put(f"nvfp4_{name}.safetensors", state)
        latent = sample(lambda graph, file=file: graphs.load_lowbit(graph, file, "as_stored"))
        stock = sample(lambda graph, file=file: graphs.load(graph, file))
        # Both dequantize on a CPU, to float32; only the rounding of sums differs.
        assert difference(latent, stock) < 1e-4
        wrong[name] = difference(latent, plain)
    assert 0 < wrong["ours"] < wrong["kitchen"] < tolerance("nvfp4")


def test_log_says_which_arithmetic_runs(comfy, sample, wan):
    # Of this number of layers no other test speaks.
    keep = r"blocks\.0\.self_attn\.[qk]$"
    sample(lambda graph: graphs.load_lowbit(graph, wan, "mxfp4", keep=keep))
    lines = [line for line in comfy.log_path.read_text().splitlines() if "LowBit layers: " in line]
    assert f"of mxfp4 weights, emulated: {arithmetic.DEQUANTIZED}" in lines[-1]


def test_arithmetic_that_a_cpu_lacks_stops_both_nodes_with_the_reason(sample, wan):
    with pytest.raises(PromptError, match="w4a8: needs a device of"):
        sample(lambda graph: graphs.load_lowbit(graph, wan, "nvfp4", arithmetic="w4a8"))
    with pytest.raises(PromptError, match="w4a8: needs a device of"):
        sample(lambda graph: graphs.load_lowbit(graph, wan, "nvfp4", arithmetic="w4a8_exact"))
    with pytest.raises(PromptError, match="w4a4: needs a device of"):
        sample(lambda graph: graphs.load_lowbit(graph, wan, "mxfp4", arithmetic="native"))
    with pytest.raises(PromptError, match="w4a8 is for nvfp4, mxfp4, not for int8"):
        sample(lambda graph: graphs.load_lowbit(graph, wan, "int8", arithmetic="w4a8"))
    with pytest.raises(PromptError, match="the model has no layers of nvfp4, mxfp4"):
        sample(lambda graph: graphs.load_lowbit(graph, wan, "as_stored", arithmetic="w4a8"))


@pytest.mark.parametrize(("written", "marked"), [("mxfp4", "nvfp4"), ("nvfp4", "mxfp4")])
def test_scales_of_the_other_kind_are_refused_by_layer(comfy, tensors, put, written, marked):
    state = tensors(written)
    bad = next(n for n in state if n.endswith(".comfy_quant"))
    state[bad] = marker_tensor({"format": marked})
    file = put("mixed.safetensors", state)
    graph = graphs.Graph()
    graphs.save(graph, graphs.sample(graph, graphs.load_lowbit(graph, file, "as_stored"), "wan"))
    layer = bad.removesuffix(".comfy_quant")
    with pytest.raises(PromptError, match=rf"layer {layer}: {marked}: .*do not mix"):
        comfy.run(graph)


def test_scales_of_another_size_are_refused_by_layer(comfy, tensors, put):
    state = tensors("mxfp4")
    bad = next(n for n in state if n.endswith(".weight_scale"))
    state[bad] = state[bad][:, :-1]
    file = put("truncated.safetensors", state)
    graph = graphs.Graph()
    graphs.save(graph, graphs.sample(graph, graphs.load_lowbit(graph, file, "as_stored"), "wan"))
    layer = bad.removesuffix(".weight_scale")
    with pytest.raises(PromptError, match=rf"layer {layer}: mxfp4: weight_scale has"):
        comfy.run(graph)
