"""The LoRA node in a real ComfyUI: what it computes, leaves alone, merges and refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.quant import formats
from tests.checkpoints import write_lora
from tests.host import graphs
from tests.host.server import PromptError
from tests.host.test_nodes import difference, tolerance

QUICK = {"int8_convrot", "fp8_e4m3", "nvfp4"}
FORMATS = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in formats.names()
]
DIFFS = {
    "diffusion_model.blocks.0.self_attn.norm_k.diff": (256,),
    "diffusion_model.blocks.1.norm3.diff_b": (256,),
    "diffusion_model.blocks.0.self_attn.q.diff_b": (256,),
    "diffusion_model.patch_embedding.diff_b": (256,),
    "diffusion_model.patch_embedding.lora_down.weight": (4, 16, 1, 2, 2),
    "diffusion_model.patch_embedding.lora_up.weight": (256, 4, 1, 1, 1),
}
# Without a single matrix: norms, a whole convolution, biases of layers that are quantized and not.
LONE_DIFFS = {
    "diffusion_model.blocks.0.self_attn.norm_q.diff": (256,),
    "diffusion_model.blocks.1.norm3.diff": (256,),
    "diffusion_model.blocks.1.norm3.diff_b": (256,),
    "diffusion_model.patch_embedding.diff": (256, 16, 1, 2, 2),
    "diffusion_model.patch_embedding.diff_b": (256,),
    "diffusion_model.time_embedding.2.diff_b": (256,),
    "diffusion_model.blocks.0.self_attn.k.diff_b": (256,),
    "diffusion_model.blocks.1.ffn.2.diff_b": (256,),
    "diffusion_model.blocks.1.diff_m": (1, 6, 256),
}


@pytest.fixture(scope="module")
def lone_diffs(comfy):
    """The name of a file with differences alone."""
    path = comfy.model_path("lone.safetensors", "loras")
    generator = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(s, generator=generator) * 0.3 for n, s in LONE_DIFFS.items()}, path)
    return path.name


@pytest.fixture(scope="module")
def second_lora(comfy, wan):
    """The name of another LoRA, with differences of norms, biases and a convolution."""
    path = comfy.model_path("second.safetensors", "loras")
    write_lora(path, comfy.model_path(wan), rank=8, seed=5)
    generator = torch.Generator().manual_seed(0)
    more = {n: torch.randn(s, generator=generator) * 0.1 for n, s in DIFFS.items()}
    save_file({**load_file(path), **more}, path)
    return path.name


@pytest.fixture(scope="module")
def plain(sample, wan):
    return sample(lambda graph: graphs.load(graph, wan))


def stock(wan):
    return lambda graph: graphs.load(graph, wan)


def lowbit(wan, name):
    return lambda graph: graphs.load_lowbit(graph, wan, name)


def with_lora(load, name, strength=1.0, **options):
    return lambda graph: graphs.lora_lowbit(graph, load(graph), name, strength, **options)


def with_stock_lora(load, name, strength=1.0):
    return lambda graph: graphs.lora(graph, load(graph), name, strength)


@pytest.mark.parametrize("which", ["wan_lora", "second_lora"])
def test_bf16_model_takes_it_as_from_the_stock_loader(sample, wan, plain, which, request):
    name = request.getfixturevalue(which)
    want = sample(with_stock_lora(stock(wan), name))
    got = sample(with_lora(stock(wan), name))
    assert difference(want, plain) > 0.05
    # Merged weights and results of layers are both rounded to 16 bits.
    assert difference(got, want) < 0.02


def test_difference_of_modulation_is_that_of_a_file_with_it(comfy, sample, wan, plain):
    """The stock loader has no effect there: ComfyUI patches no parameter outside a layer."""
    diff = torch.randn(1, 6, 256, generator=torch.Generator().manual_seed(0)) * 0.1
    state = load_file(comfy.model_path(wan))
    state["blocks.0.modulation"] += diff.to(state["blocks.0.modulation"])
    save_file(state, comfy.model_path("modulated.safetensors"))
    path = comfy.model_path("modulation.safetensors", "loras")
    save_file({"diffusion_model.blocks.0.modulation.diff": diff.bfloat16()}, path)
    want = sample(stock("modulated.safetensors"))
    got = sample(with_lora(stock(wan), path.name))
    assert difference(want, plain) > 0.02
    # The sum is rounded to 16 bits in the file, and not where the model computes in 32.
    assert difference(got, want) < 0.005
    assert torch.equal(sample(with_lora(stock(wan), path.name, end_percent=0.0)), plain)
    assert torch.equal(sample(with_stock_lora(stock(wan), path.name)), plain)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_model_takes_it_within_the_error_of_its_format(sample, wan, wan_lora, name):
    want = sample(with_stock_lora(stock(wan), wan_lora))
    got = sample(with_lora(lowbit(wan, name), wan_lora))
    assert difference(got, want) < tolerance(name)


@pytest.mark.parametrize("name", ["int8_convrot", "nvfp4"])
def test_strength_0_and_empty_ranges_are_as_without(sample, wan, wan_lora, name):
    without = sample(lowbit(wan, name))
    for options in ({"strength": 0.0}, {"end_percent": 0.0}, {"start_percent": 1.0}):
        assert torch.equal(sample(with_lora(lowbit(wan, name), wan_lora, **options)), without)


def test_other_branches_and_later_prompts_are_without(sample, wan, wan_lora):
    load = lowbit(wan, "int8_convrot")
    before = sample(load)
    moved = sample(with_lora(load, wan_lora))
    assert difference(moved, before) > 0.05
    assert torch.equal(sample(load), before)
    assert torch.equal(sample(with_lora(load, wan_lora)), moved)


def test_two_halves_of_the_sampling_are_the_whole(sample, wan, wan_lora):
    load = lowbit(wan, "int8_convrot")
    first = with_lora(load, wan_lora, end_percent=0.5)
    both = with_lora(first, wan_lora, start_percent=0.5)
    whole = sample(with_lora(load, wan_lora))
    assert torch.equal(sample(both), whole)
    half = sample(first)
    assert not torch.equal(half, whole)
    assert not torch.equal(half, sample(load))


@pytest.mark.parametrize("name", ["int8_convrot", "bf16"])
@pytest.mark.parametrize("which", ["second_lora", "lone_diffs"])
def test_norms_and_lone_biases_follow_the_schedule(sample, wan, which, name, request):
    """What the host merges in all steps is ours to add in some, and gone in the others."""
    file = request.getfixturevalue(which)
    load = stock(wan) if name == "bf16" else lowbit(wan, name)
    plain, whole = sample(load), sample(with_lora(load, file))
    first = with_lora(load, file, end_percent=0.5)
    both = sample(with_lora(first, file, start_percent=0.5))
    # Biases in a product and those of a layer are both rounded to 16 bits.
    assert difference(both, whole) < 0.005
    # Wherever the parts meet, to the bit; the steps are two.
    other = with_lora(load, file, end_percent=0.4)
    assert torch.equal(sample(with_lora(other, file, start_percent=0.4)), both)
    half = sample(first)
    assert difference(half, whole) > 0.05 and difference(half, plain) > 0.05
    assert torch.equal(sample(with_lora(load, file, start_percent=0.9, end_percent=0.95)), plain)
    assert torch.equal(sample(load), plain)


def test_nothing_of_a_part_of_the_sampling_is_left_when_models_are_unloaded(
    comfy, sample, wan, lone_diffs
):
    plain, graph = sample(stock(wan)), graphs.Graph()
    model = with_lora(stock(wan), lone_diffs, end_percent=0.5)(graph)
    latent = graphs.unload(graph, graphs.sample(graph, model, "wan"))
    again = graphs.sample(graph, stock(wan)(graph), "wan", start=latent)
    node = graphs.save(graph, again)
    assert torch.equal(comfy.latent(comfy.run(graph), node), plain)


def test_stacked_are_their_sum(sample, wan, wan_lora):
    load = lowbit(wan, "int8_convrot")
    halves = with_lora(with_lora(load, wan_lora, 0.75), wan_lora, 0.25)
    # The same terms, rounded to 16 bits once more.
    assert difference(sample(halves), sample(with_lora(load, wan_lora))) < 0.02


@pytest.mark.parametrize("name", ["int8_convrot", "bf16"])
def test_stock_loader_works_beside_it_in_either_order(sample, wan, wan_lora, second_lora, name):
    load = stock(wan) if name == "bf16" else lowbit(wan, name)
    first = sample(with_lora(with_stock_lora(load, second_lora), wan_lora))
    then = sample(with_stock_lora(with_lora(load, wan_lora), second_lora))
    assert torch.equal(first, then)
    want = sample(with_stock_lora(with_stock_lora(stock(wan), second_lora), wan_lora))
    assert difference(first, want) < (0.02 if name == "bf16" else tolerance(name))


def test_quantizing_after_it_keeps_it(sample, wan, wan_lora):
    def quantized(graph):
        return graphs.quantize(graph, with_lora(stock(wan), wan_lora)(graph), "int8_convrot")

    want = sample(with_stock_lora(stock(wan), wan_lora))
    assert difference(sample(quantized), want) < tolerance("int8_convrot")


def test_weights_are_the_same_bytes_afterwards(comfy, wan, wan_lora):
    hashes = []
    for load in (lowbit(wan, "int8_convrot"), with_lora(lowbit(wan, "int8_convrot"), wan_lora)):
        graph = graphs.Graph()
        latent = graphs.sample(graph, load(graph), "wan")
        node = graphs.weight_hash(graph, lowbit(wan, "int8_convrot")(graph), latent)
        hashes.append(comfy.text(comfy.run(graph), node))
    assert hashes[0] == hashes[1]


def save(comfy, load, prefix):
    graph = graphs.Graph()
    inputs = {"model": load(graph), "filename_prefix": f"diffusion_models/{prefix}"}
    path = graph.add("LowBitSaveModel", **inputs)
    shown = graph.add("PreviewAny", source=path)[0]
    return comfy.offer(comfy.text(comfy.run(graph), shown), f"{prefix}.safetensors")


def test_saved_file_has_it_merged(comfy, sample, wan, second_lora):
    load = with_lora(lowbit(wan, "int8_convrot"), second_lora)
    file = save(comfy, load, "lora_merged")
    want = sample(with_stock_lora(stock(wan), second_lora))
    assert difference(sample(lowbit(file, "as_stored")), want) < tolerance("int8_convrot")
    # The model that was saved still has it beside its weights.
    assert difference(sample(load), want) < tolerance("int8_convrot")


def test_saving_a_part_of_the_sampling_is_refused(comfy, wan, wan_lora):
    load = with_lora(lowbit(wan, "int8_convrot"), wan_lora, end_percent=0.5)
    with pytest.raises(PromptError, match="cannot be merged into a file"):
        save(comfy, load, "lora_scheduled")


def test_int8_file_from_the_stock_loader_takes_it(comfy, sample, wan, wan_lora, lone_diffs):
    """There ComfyUI runs the second layer of a feed-forward without calling it."""
    file = save(comfy, lowbit(wan, "int8_convrot"), "lora_int8")
    for name, end in ((wan_lora, 1.0), (lone_diffs, 0.5)):
        got = sample(with_lora(stock(file), name, end_percent=end))
        want = sample(with_lora(lowbit(wan, "int8_convrot"), name, end_percent=end))
        assert torch.equal(got, want)


def test_qwen_image_takes_it(comfy, sample, qwen_image):
    path = comfy.model_path("qwen_lora.safetensors", "loras")
    write_lora(path, comfy.model_path(qwen_image), size=0.1)
    want = sample(with_stock_lora(stock(qwen_image), path.name), "qwen_image")
    got = sample(with_lora(lowbit(qwen_image, "int8_convrot"), path.name), "qwen_image")
    assert difference(want, sample(stock(qwen_image), "qwen_image")) > tolerance("int8_convrot")
    assert difference(got, want) < tolerance("int8_convrot")


def test_layer_of_another_shape_is_left_out_as_by_the_stock_loader(comfy, sample, wan, wan_lora):
    """A LoRA of a variant whose first layer reads more channels."""
    path = comfy.model_path("other_variant.safetensors", "loras")
    ends = {"lora_down.weight": (4, 36, 1, 2, 2), "lora_up.weight": (256, 4, 1, 1, 1)}
    more = {f"diffusion_model.patch_embedding.{e}": torch.ones(s) for e, s in ends.items()}
    save_file({**load_file(comfy.model_path(wan_lora, "loras")), **more}, path)
    got = sample(with_lora(stock(wan), path.name))
    assert torch.equal(got, sample(with_lora(stock(wan), wan_lora)))
    assert difference(got, sample(with_stock_lora(stock(wan), path.name))) < 0.02


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"diffusion_model.blocks.0.ffn.0.dora_scale": (512, 1)}, "DoRA"),
        ({"lora_unet_blocks_0_ffn_0.hada_w1_a": (512, 4)}, "LoHa"),
        ({"diffusion_model.blocks.0.ffn.0.diff": (512, 256)}, "whole difference"),
        ({"text_model.layers.0.lora_A.weight": (4, 8)}, "nothing in it fits"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_it_cannot_do_is_refused_by_name(comfy, wan, tensors, message):
    path = comfy.model_path("refused.safetensors", "loras")
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    graph = graphs.Graph()
    model = with_lora(lowbit(wan, "int8_convrot"), path.name)(graph)
    graphs.save(graph, graphs.sample(graph, model, "wan"))
    with pytest.raises(PromptError, match=message):
        comfy.run(graph)
