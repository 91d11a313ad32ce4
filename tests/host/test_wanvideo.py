"""The nodes for WanVideoWrapper with that pack, its loader and its sampler in a real ComfyUI."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.ops.attention.modes import MODES
from lowbit.quant import formats
from lowbit.quant.quantize_file import quantize_file
from tests.checkpoints import write_lora, write_wan
from tests.host import graphs, schemata
from tests.host.server import HostMissingError, PromptError, Server, find_wrapper
from tests.workflows import shipped

# That pack reads the number of blocks from the width: 30, of 12 heads.
LAYERS = 30
WAN, WIDE, SCALED, LORA = (
    "wan.safetensors",
    "wide.safetensors",
    "scaled.safetensors",
    "lora.safetensors",
)
LOADER = {
    "base_precision": "fp32",
    "quantization": "disabled",
    "load_device": "offload_device",
    "attention_mode": "sdpa",
}
SAMPLER = {
    "cfg": 1.0,
    "shift": 5.0,
    "seed": 1,
    "force_offload": True,
    "scheduler": "euler",
    "riflex_freq_index": 0,
}
# Layers whose number of inputs is no multiple of 256 cannot be rotated.
ROTATED = ("int8_convrot", "asym_w4a8_int8")
# All blocks but two: on a CPU a layer takes a second in some formats.
MOST = r"blocks\.(?!1[01]\.)"

# Of shipped workflows: what needs files that tests do not have, and what makes the others quick.
NEEDS_FILES = {"CLIPLoader", "WanVideoVAELoader", "WanVideoDecode", "SaveAnimatedWEBP"}
SMALLER = {
    "WanVideoModelLoader": {"base_precision": "fp32"},
    "WanVideoEmptyEmbeds": {"width": 64, "height": 64, "num_frames": 5},
    "WanVideoSampler": {"steps": 1, "cfg": 1.0},
    "WanVideoBlockSwap": {"blocks_to_swap": 2},
    "LowBitQuantizeWanVideo": {"keep": MOST},
}
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """A running `Server` with WanVideoWrapper; skips where one of them is missing."""
    try:
        pack = find_wrapper()
    except HostMissingError as error:
        pytest.skip(str(error))
    server = Server(tmp_path_factory.mktemp("comfy_wanvideo"), (pack,))
    try:
        server.start()
        write_wan(server.model_path(WAN), dim=384, ffn=512, layers=LAYERS)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def wide(comfy):
    """The name of a model of width 768, which every format takes."""
    write_wan(comfy.model_path(WIDE), dim=768, ffn=512, layers=LAYERS)
    return WIDE


@pytest.fixture(scope="module")
def scaled(comfy, tmp_path_factory):
    """The name of a scaled FP8 file as that pack knows them."""
    path = tmp_path_factory.mktemp("scaled") / SCALED
    quantize_file(comfy.model_path(WAN), path, "fp8_e4m3")
    tensors = {
        name.replace(".weight_scale", ".scale_weight"): value
        for name, value in load_file(path).items()
        if not name.endswith(".comfy_quant")
    }
    tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(tensors, comfy.model_path(SCALED))
    return SCALED


@pytest.fixture(scope="module")
def lora(comfy):
    """The name of a LoRA for every Linear in the blocks."""
    # Stronger ones, over 30 layers, make two samplings of one model differ as much.
    write_lora(comfy.model_path(LORA, "loras"), comfy.model_path(WAN), size=0.05)
    return LORA


def load(graph, name=WAN, **options):
    return graph.add("WanVideoModelLoader", model=name, **LOADER | options)


def load_with(graph, lora, merge, **options):
    return load(graph, lora=select(graph, lora, merge), **options)


def select(graph, lora, merge, strength=1.0):
    options = {"low_mem_load": False, "merge_loras": merge}
    return graph.add("WanVideoLoraSelect", lora=lora, strength=strength, **options)


def quantize(graph, model, format_name, recipe="auto", keep="", **options):
    inputs = {"format": format_name, "recipe": recipe, "keep": keep, **options}
    return graph.add("LowBitQuantizeWanVideo", model=model, **inputs)


def attention(graph, model, mode, **options):
    inputs = {"layers": "all", "blocks": "", "start_percent": 0.0, "end_percent": 1.0}
    inputs |= {"guard": "off", **options}
    return graph.add("LowBitWanVideoAttention", model=model, mode=mode, **inputs)


def sampler(graph, model, steps=1):
    text = graph.add(
        "LowBitTestConditioning", length=16, width=4096, seed=11, nonce=next(graphs._nonces)
    )
    return graph.add(
        "WanVideoSampler",
        model=model,
        text_embeds=graph.add("WanVideoTextEmbedBridge", positive=text),
        image_embeds=graph.add("WanVideoEmptyEmbeds", width=64, height=64, num_frames=5),
        steps=steps,
        **SAMPLER,
    )


@pytest.fixture(scope="module")
def sample(comfy):
    """A function (build, steps) -> latent: build(graph) returns the model to sample with."""

    def run(build, steps=1) -> torch.Tensor:
        graph = graphs.Graph()
        node = graphs.save(graph, sampler(graph, build(graph), steps))
        return comfy.latent(comfy.run(graph), node)

    return run


@pytest.fixture(scope="module")
def plain(sample):
    """The latent of the model without our nodes."""
    return sample(load)


@pytest.fixture(scope="module")
def int8(sample):
    """The latent of the model in INT8."""
    return sample(lambda graph: quantize(graph, load(graph), "int8"))


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def tolerance(name):
    """As in test_nodes.py: twice the rounding of a weight, for activations and depth."""
    return 2 * formats.get(name).max_error


def test_int8_gives_nearly_the_plain_latent(int8, plain):
    assert 0 < difference(int8, plain) < tolerance("int8")


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_format_gives_nearly_the_plain_latent(sample, plain, name):
    latent = sample(lambda graph: quantize(graph, load(graph), name))
    assert 0 < difference(latent, plain) < tolerance(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROTATED)
def test_rotated_format_gives_nearly_the_plain_latent(sample, wide, name):
    plain = sample(lambda graph: load(graph, wide))
    latent = sample(lambda graph: quantize(graph, load(graph, wide), name, keep=MOST))
    assert 0 < difference(latent, plain) < tolerance(name)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["plain", "ours"])
def test_other_branch_is_untouched(comfy, plain, first):
    graph = graphs.Graph()
    model = load(graph)
    ours = attention(graph, quantize(graph, model, "int8"), "lowbit_exact")
    branches = {"plain": model, "ours": ours}
    saved = {}
    for branch in sorted(branches, key=lambda b: b != first):
        saved[branch] = graphs.save(graph, sampler(graph, branches[branch]))
    entry = comfy.run(graph)
    assert torch.equal(comfy.latent(entry, saved["plain"]), plain)
    assert difference(comfy.latent(entry, saved["ours"]), plain) > 0


@pytest.mark.slow
def test_scaled_fp8_keeps_its_scales_in_float32(sample, scaled):
    stored = sample(lambda graph: quantize(graph, load(graph, scaled), "as_stored"))
    again = sample(lambda graph: quantize(graph, load(graph), "fp8_e4m3"))
    assert torch.equal(stored, again)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_file_in_a_format_of_ours_is_kept_as_it_is(comfy, sample, name):
    file = f"stored_{name}.safetensors"
    quantize_file(comfy.model_path(WAN), comfy.model_path(file), name)
    stored = sample(lambda graph: quantize(graph, load(graph, file), "as_stored"))
    assert torch.equal(stored, sample(lambda graph: quantize(graph, load(graph), name)))


def test_unmerged_lora_stays(sample, plain, lora):
    wanted = sample(lambda graph: load_with(graph, lora, False))
    assert difference(wanted, plain) > tolerance("int8")
    latent = sample(lambda graph: quantize(graph, load_with(graph, lora, False), "int8"))
    assert 0 < difference(latent, wanted) < tolerance("int8")


@pytest.mark.slow
def test_lora_set_later_is_the_loaders(sample, lora):
    def later(graph):
        model = quantize(graph, load(graph), "int8")
        chosen = select(graph, lora, False)
        return graph.add("WanVideoSetLoRAs", model=model, lora=chosen)

    latent = sample(later)
    before = sample(lambda graph: quantize(graph, load_with(graph, lora, False), "int8"))
    assert torch.equal(latent, before)


def test_lora_ends_with_its_branch(sample, int8, lora):
    def with_lora(graph):
        model = quantize(graph, load(graph), "int8")
        return graph.add("WanVideoSetLoRAs", model=model, lora=select(graph, lora, False))

    def without(graph):
        return quantize(graph, load(graph), "int8")

    assert not torch.equal(sample(with_lora), int8)
    assert torch.equal(sample(without), int8)


@pytest.mark.slow
def test_merged_lora_stays(sample, plain, lora):
    wanted = sample(lambda graph: load_with(graph, lora, True))
    assert difference(wanted, plain) > tolerance("int8")
    latent = sample(lambda graph: quantize(graph, load_with(graph, lora, True), "int8"))
    assert 0 < difference(latent, wanted) < tolerance("int8")


def test_block_swap_changes_nothing(sample, int8):
    def swapped(graph):
        options = {"offload_img_emb": True, "offload_txt_emb": True, "vace_blocks_to_swap": 0}
        swap = graph.add("WanVideoBlockSwap", blocks_to_swap=20, **options)
        return quantize(graph, load(graph, block_swap_args=swap), "int8")

    assert torch.equal(sample(swapped), int8)


@pytest.mark.parametrize("mode", ["sdpa", "auto"])
def test_torchs_own_attention_gives_the_same_latent(sample, plain, mode):
    assert torch.equal(sample(lambda graph: attention(graph, load(graph), mode)), plain)


def test_rotation_changes_nothing_of_the_exact_reference(sample):
    def attend(**options):
        return sample(lambda graph: attention(graph, load(graph), "lowbit_exact", **options))

    assert torch.equal(attend(rotation="hadamard"), attend())


def test_layers_blocks_and_steps_add_up(sample):
    def attend(**options):
        return sample(lambda g: attention(g, load(g), "lowbit_exact", **options), steps=2)

    plain, everything = sample(load, steps=2), attend()
    assert 0 < difference(everything, plain) < 2 * MODES["exact"].max_error
    parts = [
        {"layers": "self"},
        {"layers": "cross"},
        {"blocks": "0-9"},
        {"start_percent": 0.5},
        {"end_percent": 0.5},
    ]
    for part in parts:
        latent = attend(**part)
        assert not torch.equal(latent, plain), part
        assert not torch.equal(latent, everything), part
    assert torch.equal(attend(end_percent=0.0), plain)
    assert torch.equal(attend(blocks=f"{LAYERS}-"), plain)


def test_two_in_a_row_give_what_one_gives(sample):
    def two(graph):
        model = attention(graph, load(graph), "lowbit_exact", blocks="0-9")
        return attention(graph, model, "lowbit_exact", blocks="10-")

    one = sample(lambda graph: attention(graph, load(graph), "lowbit_exact"))
    assert torch.equal(sample(two), one)


def test_override_of_the_pack_comes_first(sample, plain):
    def overridden(graph):
        model = attention(graph, load(graph), "lowbit_exact", layers="self")
        options = {"attention_mode": "sdpa", "start_step": 0, "end_step": 10, "verbose": False}
        return graph.add("WanVideoSetAttentionModeOverride", model=model, **options)

    assert torch.equal(sample(overridden), plain)


def test_order_of_the_nodes_does_not_matter(sample):
    first = sample(lambda g: quantize(g, attention(g, load(g), "lowbit_exact"), "int8"))
    second = sample(lambda g: attention(g, quantize(g, load(g), "int8"), "lowbit_exact"))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda g: quantize(g, load(g), "as_stored"), "no quantized layers to keep"),
        (lambda g: quantize(g, load(g), "int8", keep="blocks"), "nothing to quantize"),
        (
            lambda g: quantize(g, load(g, quantization="fp8_e4m3fn_fast"), "int8"),
            "Choose one without _fast",
        ),
        (
            lambda g: quantize(g, load(g), "nvfp4", arithmetic="w4a8"),
            "w4a8: needs a device of",
        ),
        (
            lambda g: quantize(g, load(g), "int8", arithmetic="w4a8"),
            "w4a8 is for nvfp4, mxfp4, not for int8",
        ),
        (lambda g: attention(g, load(g), "sageattn"), "sageattn: needs a device of"),
        (lambda g: attention(g, load(g), "auto", blocks="first"), "neither a block nor a range"),
    ],
    ids=["as_stored", "keep", "fast", "w4a8", "w4a8_of_int8", "sage", "blocks"],
)
def test_what_cannot_run_is_refused_with_the_reason(comfy, build, message):
    graph = graphs.Graph()
    graphs.save(graph, sampler(graph, build(graph)))
    with pytest.raises(PromptError, match=message):
        comfy.run(graph)


@pytest.mark.parametrize("name", [n for n in shipped.NAMES if shipped.needs_wrapper(n)])
def test_shipped_workflow_fits_the_wrappers_nodes_and_samples(comfy, wide, name):
    schemas, prompt = comfy.object_info(), shipped.api(name)
    schemata.check_inputs(schemas, prompt)
    schemata.check_order(schemas, prompt)
    # Editors give an own value to each widget up to the last of a node.
    for node in prompt.values():
        if node["class_type"].startswith(shipped.WRAPPER):
            inputs = schemas[node["class_type"]]["input"]
            known = inputs.get("required", {}) | inputs.get("optional", {})
            widgets = {
                n for n, (kind, *_) in known.items() if isinstance(kind, list) or kind in WIDGETS
            }
            given = {n for n, value in node["inputs"].items() if not shipped.is_link(value)}
            assert widgets == given, node["class_type"]
    graph = graphs.Graph()
    for key, node in prompt.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        if kind in NEEDS_FILES:
            continue
        if kind == "CLIPTextEncode":
            kind = "LowBitTestConditioning"
            inputs = {"length": 16, "width": 4096, "seed": int(key), "nonce": 0}
        small = SMALLER.get(kind, {}) | ({"model": wide} if kind == "WanVideoModelLoader" else {})
        graph[key] = {"class_type": kind, "inputs": inputs | small}
    last = next(k for k, node in graph.items() if node["class_type"] == "WanVideoSampler")
    node_id = "save"
    inputs = {"samples": [last, 0], "filename_prefix": "workflow"}
    graph[node_id] = {"class_type": "SaveLatent", "inputs": inputs}
    assert comfy.latent(comfy.run(graph), node_id).isfinite().all()
