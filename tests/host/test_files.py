"""Files as others write them, through the pack's loader and quantizer in a real ComfyUI."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.quant import formats
from lowbit.quant.quantize_file import quantize_file
from tests.host import graphs
from tests.host.server import PromptError
from tests.host.test_nodes import difference, tolerance


@pytest.fixture(scope="module")
def plain(sample, wan):
    return sample(lambda graph: graphs.load(graph, wan))


@pytest.fixture(scope="module")
def dense(comfy, wan):
    """The tensors of the small Wan."""
    return load_file(comfy.model_path(wan))


@pytest.fixture
def put(comfy):
    """A function (name, tensors, metadata) -> the name under which loaders list the file."""

    def write(name, tensors, metadata=None) -> str:
        save_file({n: t.contiguous() for n, t in tensors.items()}, comfy.model_path(name), metadata)
        return name

    return write


@pytest.fixture
def quantized(comfy, wan):
    """A function format -> the tensors of the small Wan in it."""

    def run(format_name) -> dict[str, torch.Tensor]:
        target = comfy.model_path(f"tensors_{format_name}.safetensors")
        quantize_file(comfy.model_path(wan), target, format_name, overwrite=True)
        return load_file(target)

    return run


def marked_in_header(tensors):
    """The tensors with their markers in `_quantization_metadata` instead."""
    markers = {n: t for n, t in tensors.items() if n.endswith(".comfy_quant")}
    layers = {
        n.removesuffix(".comfy_quant"): json.loads(bytes(t.tolist())) for n, t in markers.items()
    }
    rest = {n: t for n, t in tensors.items() if n not in markers}
    return rest, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


@pytest.mark.parametrize("name", ["as_stored", "int8_convrot", "fp8_e5m2", "nvfp4"])
def test_header_marked_fp8_is_what_it_was_asked_to_be(sample, put, quantized, plain, name):
    file = put("header.safetensors", *marked_in_header(quantized("fp8_e4m3")))
    latent = sample(lambda graph: graphs.load_lowbit(graph, file, name))
    allowed = tolerance("fp8_e4m3") + (0 if name == "as_stored" else tolerance(name))
    assert 0 < difference(latent, plain) < allowed


@pytest.mark.parametrize("name", ["as_stored", "int8_convrot"])
def test_legacy_scaled_fp8_keeps_its_scales(sample, put, quantized, plain, name):
    words = {"weight_scale": "scale_weight"}
    legacy = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, tensor in quantized("fp8_e4m3").items():
        module, _, part = key.rpartition(".")
        if part != "comfy_quant":
            legacy[f"{module}.{words.get(part, part)}"] = tensor
    file = put("legacy.safetensors", legacy)
    latent = sample(lambda graph: graphs.load_lowbit(graph, file, name))
    assert 0 < difference(latent, plain) < tolerance("fp8_e4m3") + tolerance("int8_convrot")


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["as_stored", "int8_convrot"])
def test_prefixed_file_gives_the_plain_files_latent(sample, put, dense, wan, prefix, name):
    file = put("prefixed.safetensors", {prefix + n: t for n, t in dense.items()})
    latent = sample(lambda graph: graphs.load_lowbit(graph, file, name))
    assert torch.equal(latent, sample(lambda graph: graphs.load_lowbit(graph, wan, name)))


def test_diffusers_named_wan_loads_and_quantizes(sample, put):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "ffn_dim": 512, "num_layers": 2, "text_dim": 4096}
    state = WanTransformer3DModel(**sizes).state_dict()
    file = put("diffusers.safetensors", {n: t.bfloat16() for n, t in state.items()})
    stored = sample(lambda graph: graphs.load_lowbit(graph, file, "as_stored"))
    latent = sample(lambda graph: graphs.load_lowbit(graph, file, "int8_convrot"))
    assert 0 < difference(latent, stored) < tolerance("int8_convrot")


def test_fp8_without_scales_is_under_auto_what_the_stock_loader_makes_of_it(sample, put, dense):
    matrices = {n: t.to(torch.float8_e4m3fn) for n, t in dense.items() if t.dim() == 2}
    file = put("plain_fp8.safetensors", dense | matrices)
    stock = sample(lambda graph: graphs.load(graph, file))
    assert torch.equal(sample(lambda graph: graphs.load_lowbit(graph, file, "auto")), stock)


def smoothed(tensors):
    """NVFP4 tensors of the same model, half of each layer's scale moved to its input."""
    fmt = formats.get("nvfp4")
    result = dict(tensors)
    for key in [n for n in tensors if n.endswith(".comfy_quant")]:
        layer = key.removesuffix(".comfy_quant")
        parts = {p: tensors[f"{layer}.{p}"] for p in ("weight", *fmt.scales.values())}
        weight = fmt.unpack(parts, torch.float32).dequantize()
        scale = torch.linspace(0.5, 2, weight.shape[1])
        moved = fmt.pack(fmt.quantize(weight / scale))
        result |= {f"{layer}.{p}": t for p, t in moved.items()}
        result[f"{layer}.pre_quant_scale"] = scale
    return result


def test_smoothing_of_a_stock_nvfp4_model_is_folded_in(sample, put, quantized):
    file = put("smoothed.safetensors", smoothed(quantized("nvfp4")))
    stock = sample(lambda graph: graphs.load(graph, file))
    latent = sample(lambda graph: graphs.quantize(graph, graphs.load(graph, file), "int8_convrot"))
    assert 0 < difference(latent, stock) < tolerance("int8_convrot")


def test_smoothing_by_one_value_is_of_all_columns(sample, put, quantized):
    """Half the input and twice the weight are the same numbers."""
    tensors = quantized("nvfp4")
    halves = dict(tensors)
    for key in [n for n in tensors if n.endswith(".weight_scale_2")]:
        halves[key] = tensors[key] * 2
        halves[f"{key.removesuffix('.weight_scale_2')}.pre_quant_scale"] = torch.tensor(0.5)
    files = [put("whole.safetensors", tensors), put("halves.safetensors", halves)]
    want, stock = (sample(lambda graph, f=file: graphs.load(graph, f)) for file in files)
    assert difference(stock, want) < 1e-4
    for fmt in ("as_stored", "int8_convrot"):
        whole, latent = (
            sample(lambda graph, f=file, fmt=fmt: graphs.load_lowbit(graph, f, fmt))
            for file in files
        )
        assert difference(latent, whole) < 1e-4


def test_stock_nvfp4_model_keeps_its_bits_under_our_arithmetic(sample, put, quantized):
    file = put("nvfp4.safetensors", quantized("nvfp4"))
    stock = sample(lambda graph: graphs.load(graph, file))
    latent = sample(lambda graph: graphs.quantize(graph, graphs.load(graph, file), "as_stored"))
    # Both dequantize on a CPU, to float32; only the rounding of sums differs.
    assert difference(latent, stock) < 1e-4


def test_saved_model_holds_the_lora(sample, comfy, wan, wan_lora):
    def patched(graph):
        model = graphs.quantize(graph, graphs.load(graph, wan), "int8_convrot")
        return graphs.lora(graph, model, wan_lora, 1.0)

    graph = graphs.Graph()
    graph.add("LowBitSaveModel", model=patched(graph), filename_prefix="diffusion_models/patched")
    path = comfy.run(graph)["outputs"].popitem()[1]["text"][0]
    file = path.rpartition("/")[2]
    want = sample(patched)
    assert torch.equal(sample(lambda graph: graphs.load(graph, file)), want)
    report = json.loads(load_metadata(path)["_lowbit"])
    assert not any("error" in entry for entry in report["layers"].values())
    assert report["versions"]["comfy-kitchen"]


def load_metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_missing_weight_is_named(comfy, put, dense):
    rest = {n: t for n, t in dense.items() if n != "blocks.1.ffn.0.weight"}
    graph = graphs.Graph()
    file = put("incomplete.safetensors", rest)
    graphs.save(graph, graphs.sample(graph, graphs.load_lowbit(graph, file, "int8_convrot"), "wan"))
    with pytest.raises(PromptError, match=r"missing, the first of blocks\.1\.ffn\.0"):
        comfy.run(graph)


def test_as_stored_on_a_plain_model_says_so(comfy, wan):
    graph = graphs.Graph()
    model = graphs.quantize(graph, graphs.load(graph, wan), "as_stored")
    graphs.save(graph, graphs.sample(graph, model, "wan"))
    with pytest.raises(PromptError, match="no quantized layers"):
        comfy.run(graph)


@pytest.mark.parametrize("later", [False, True])
def test_static_input_scale_is_used(sample, put, quantized, plain, later):
    """A scale so small that most activations are cut off shows that it is used at all.

    later: the file is loaded by the stock loader, and its layers become ours afterwards.
    """
    tensors, latents = quantized("fp8_e4m3"), {}
    for scale in (None, 0.5, 0.001):
        added = {
            f"{key.removesuffix('.weight_scale')}.input_scale": torch.tensor(scale)
            for key in tensors
            if scale is not None and key.endswith(".weight_scale")
        }
        file = put(f"static_{scale}.safetensors", {**tensors, **added})
        latents[scale] = sample(
            lambda graph, file=file: (
                graphs.quantize(graph, graphs.load(graph, file), "as_stored")
                if later
                else graphs.load_lowbit(graph, file, "as_stored")
            )
        )
    fine = difference(latents[0.5], plain)
    assert 0 < fine < 2 * tolerance("fp8_e4m3")
    assert difference(latents[0.5], latents[None]) > 0
    assert difference(latents[0.001], plain) > 2 * fine
