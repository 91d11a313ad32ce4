"""NVFP4 of several programs, and GGUF, in a real ComfyUI: they load, sample and agree."""

import gc

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import load_file, save_file

from lowbit.quant.checkpoint.stored import marker_tensor
from lowbit.quant.quantize_file import quantize_file
from tests import foreign, gguf_files
from tests.host import graphs
from tests.host.server import PromptError
from tests.host.test_nodes import difference, tolerance

MARKER = marker_tensor({"format": "nvfp4"})


@pytest.fixture(scope="module")
def plain(sample, wan):
    return sample(lambda graph: graphs.load(graph, wan))


@pytest.fixture(scope="module")
def dense(comfy, wan):
    return load_file(comfy.model_path(wan))


@pytest.fixture(scope="module")
def ours(comfy, wan):
    """The tensors of the small Wan in NVFP4, as this pack's command line writes them."""
    target = comfy.model_path("ours_nvfp4.safetensors")
    quantize_file(comfy.model_path(wan), target, "nvfp4")
    return load_file(target)


def by_kitchen(weight):
    """A layer as comfy-kitchen's own quantizer gives it."""
    made = QuantizedTensor.from_float(weight.float(), "TensorCoreNVFP4Layout")
    tensors = made.state_dict("weight")
    return tensors | {"comfy_quant": MARKER}


PROGRAMS = {
    "comfy-kitchen": by_kitchen,
    "ours": lambda w: foreign.packed("nvfp4", w) | {"comfy_quant": MARKER},
    "modelopt": foreign.modelopt,
    "lightx2v": foreign.lightx2v,
}


@pytest.fixture(scope="module")
def latents(comfy, sample, dense, ours):
    """The latent of the small Wan as each program quantizes the same layers, through our loader."""
    layers = [
        n.removesuffix(".comfy_quant")
        for n in ours
        if n.endswith(".comfy_quant") and bytes(ours[n].tolist()) == bytes(MARKER.tolist())
    ]
    assert len(layers) > 5
    found = {}
    for program, make in PROGRAMS.items():
        tensors = dict(dense)
        for name in layers:
            parts = make(tensors.pop(f"{name}.weight").float())
            # ModelOpt's and LightX2V's static scales would cut activations off where ours do not.
            parts = {p: t for p, t in parts.items() if p != "input_scale"}
            # A file holds no tensor twice.
            tensors |= {f"{name}.{p}": t.clone().contiguous() for p, t in parts.items()}
        metadata = {"quantization_config": "modelopt"} if program == "modelopt" else None
        file = f"{program}.safetensors"
        save_file(tensors, comfy.model_path(file), metadata)
        found[program] = sample(lambda graph, f=file: graphs.load_lowbit(graph, f, "as_stored"))
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_nvfp4_of_every_program_samples_as_the_bf16_model_does(latents, plain, program):
    assert 0 < difference(latents[program], plain) < tolerance("nvfp4")


def test_programs_agree(latents):
    """The same numbers in other orders; of LightX2V's tensor scale the last bit differs."""
    assert torch.equal(latents["modelopt"], latents["ours"])
    assert difference(latents["lightx2v"], latents["ours"]) < 0.01
    # comfy-kitchen rounds other scales, so that only the error of the format is left between them.
    assert difference(latents["comfy-kitchen"], latents["ours"]) < tolerance("nvfp4")


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_rowwise", "fp8_e5m2", "mxfp8"])
def test_payload_of_plain_bytes_is_read_as_its_marking_says(comfy, sample, wan, name):
    """The host converts the values of what is no FP8, which would be noise."""
    target = comfy.model_path(f"named_{name}.safetensors")
    quantize_file(comfy.model_path(wan), target, name)
    tensors = load_file(target)
    payloads = [n.replace(".comfy_quant", ".weight") for n in tensors if n.endswith("comfy_quant")]
    plain = {n: tensors[n].view(torch.uint8) for n in payloads if tensors[n].itemsize == 1}
    assert len(plain) > 5
    save_file(tensors | plain, comfy.model_path(f"bytes_{name}.safetensors"))
    named, as_bytes = (
        sample(
            lambda graph, f=f"{how}_{name}.safetensors": graphs.load_lowbit(graph, f, "as_stored")
        )
        for how in ("named", "bytes")
    )
    assert torch.equal(named, as_bytes)


def test_what_is_ambiguous_is_refused_naming_the_command(comfy, dense):
    tensors = dict(dense)
    parts = foreign.modelopt(tensors.pop("blocks.0.ffn.0.weight").float())
    tensors |= {f"blocks.0.ffn.0.{p}": t.contiguous() for p, t in parts.items()}
    save_file(tensors, comfy.model_path("whose.safetensors"))
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, "whose.safetensors", "as_stored")
    graphs.save(graph, graphs.sample(graph, model, "wan"))
    with pytest.raises(PromptError, match=r"lowbit convert .*--from modelopt"):
        comfy.run(graph)


def test_gguf_is_listed_quantized_and_sampled(comfy, sample, dense, plain):
    gguf_files.write(comfy.model_path("wan.gguf"), dense, "Q8_0")
    gc.collect()
    (names, _) = comfy.object_info("LowBitLoadDiffusionModel")["input"]["required"]["model_name"]
    assert "wan.gguf" in names
    stock = comfy.object_info("UNETLoader")["input"]["required"]["unet_name"][0]
    assert "wan.gguf" not in stock
    latent = sample(lambda graph: graphs.load_lowbit(graph, "wan.gguf", "int8_convrot"))
    assert 0 < difference(latent, plain) < 2 * tolerance("int8_convrot")


def test_gguf_as_stored_is_refused(comfy, dense):
    gguf_files.write(comfy.model_path("stored.gguf"), dense, "Q8_0")
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, "stored.gguf", "as_stored")
    graphs.save(graph, graphs.sample(graph, model, "wan"))
    with pytest.raises(PromptError, match="Q8_0 blocks of GGUF cannot stay as stored"):
        comfy.run(graph)
