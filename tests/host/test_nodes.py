"""The pack's nodes in a real ComfyUI: what they compute, undo, save and refuse."""

import time

import pytest
import torch

from lowbit.quant import formats
from tests.host import graphs
from tests.host.server import PromptError, PromptInterrupted

ALL = formats.names()
# the stock loader refuses per-row scales in an FP8 file, and knows no MXFP4
NOT_FOR_THE_STOCK_LOADER = {"fp8_e4m3_rowwise", "mxfp4"}
STRENGTHS = (1.0, 0.5, -1.0)
# the rest is marked slow: the 761 MB model takes a minute in some formats on a CPU
QWEN_QUICK = {"int8_convrot"}
LORA_QUICK = {"int8_convrot"}
# quantizing the 761 MB model to this format takes a minute on a CPU, a stop one piece of a layer
SLOW_FORMAT = "nvfp4"
STOP_TIMEOUT_S = 20


def some(quick: set[str]) -> list:
    """All formats as parameters, those that are not in `quick` marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in ALL]


def tolerance(format_name: str) -> float:
    """The relative L2 error that a latent may have in this format.

    `max_error` bounds the rounding of a weight. Activations are rounded about as coarsely, which
    makes sqrt 2; another sqrt 2 is for depth, where errors add up but residuals damp them.
    """
    return 2 * formats.get(format_name).max_error


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The relative L2 difference of `a` from `b`."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def plain(sample, wan):
    """The latent of the bf16 model, from the stock loader."""
    return sample(lambda graph: graphs.load(graph, wan))


@pytest.mark.parametrize("name", ALL)
def test_loader_gives_nearly_the_bf16_latent(sample, wan, plain, name):
    latent = sample(lambda graph: graphs.load_lowbit(graph, wan, name))
    assert 0 < difference(latent, plain) < tolerance(name)


@pytest.mark.parametrize("name", ALL)
def test_quantizer_gives_the_loaders_latent(sample, wan, name):
    loaded = sample(lambda graph: graphs.load_lowbit(graph, wan, name))
    quantized = sample(lambda graph: graphs.quantize(graph, graphs.load(graph, wan), name))
    assert torch.equal(loaded, quantized)


def test_as_stored_gives_the_stock_loaders_latent(sample, wan, plain):
    assert torch.equal(sample(lambda graph: graphs.load_lowbit(graph, wan, "as_stored")), plain)


def test_auto_quantizes_what_is_not_quantized(comfy, sample, wan):
    def load(name, format_name):
        return sample(lambda graph: graphs.load_lowbit(graph, name, format_name))

    assert torch.equal(load(wan, "auto"), load(wan, "int8_convrot"))
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, "fp8_e4m3")
    path = graph.add("LowBitSaveModel", model=model, filename_prefix="diffusion_models/auto")
    shown = graph.add("PreviewAny", source=path)[0]
    file = comfy.offer(comfy.text(comfy.run(graph), shown), "saved_for_auto.safetensors")
    assert torch.equal(load(file, "auto"), load(file, "as_stored"))


@pytest.mark.parametrize("quantized_first", [True, False])
def test_plain_branch_beside_a_quantized_one_is_untouched(comfy, wan, plain, quantized_first):
    graph = graphs.Graph()
    model = graphs.load(graph, wan)
    branches = {"plain": model, "quantized": graphs.quantize(graph, model, "int8_convrot")}
    order = sorted(branches, reverse=quantized_first)
    saved = {}
    start = None
    for branch in order:
        latent = graphs.sample(graph, branches[branch], "wan", start=start)
        saved[branch] = graphs.save(graph, latent)
        # the next branch begins only once this one has ended, from an empty latent again
        start = graph.add("LatentMultiply", samples=latent, multiplier=0.0)
    entry = comfy.run(graph)
    assert torch.equal(comfy.latent(entry, saved["plain"]), plain)
    assert difference(comfy.latent(entry, saved["quantized"]), plain) > 0


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", some(LORA_QUICK))
def test_lora_moves_the_latent_as_it_moves_bf16(sample, wan, wan_lora, plain, name, strength):
    def bf16_with_lora(graph):
        return graphs.lora(graph, graphs.load(graph, wan), wan_lora, strength)

    def quantized(graph):
        return graphs.quantize(graph, graphs.load(graph, wan), name)

    latent = sample(lambda graph: graphs.lora(graph, quantized(graph), wan_lora, strength))
    lora_first = sample(lambda graph: graphs.quantize(graph, bf16_with_lora(graph), name))
    assert torch.equal(latent, lora_first)

    move, bf16_move = latent - sample(quantized), sample(bf16_with_lora) - plain
    # two latents, each within the format's tolerance
    assert (move - bf16_move).norm() < 2 * tolerance(name) * plain.norm()
    # an unapplied LoRA gives 0, one of the wrong sign -1; the coarsest format measured 0.7
    assert torch.cosine_similarity(move.flatten(), bf16_move.flatten(), dim=0) > 0.5


@pytest.mark.parametrize("name", ALL)
def test_removing_a_lora_restores_every_stored_byte(comfy, wan, wan_lora, name):
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, name)
    first = graphs.sample(graph, model, "wan")
    before = graphs.weight_hash(graph, model, first)
    entry = comfy.run(graph)
    hashes = comfy.text(entry, before)
    assert "blocks.0.ffn.0.weight" in hashes

    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, name)
    moved = graphs.sample(graph, graphs.lora(graph, model, wan_lora, 1.0), "wan")
    after = graphs.weight_hash(graph, model, moved)
    assert comfy.text(comfy.run(graph), after) == hashes


@pytest.mark.parametrize("name", ALL)
def test_unloading_and_reloading_changes_nothing(comfy, wan, name):
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, name)
    first = graphs.sample(graph, model, "wan")
    empty = graph.add("LatentMultiply", samples=graphs.unload(graph, first), multiplier=0.0)
    second = graphs.sample(graph, model, "wan", start=empty)
    saved = [graphs.save(graph, latent) for latent in (first, second)]
    entry = comfy.run(graph)
    assert torch.equal(*(comfy.latent(entry, node) for node in saved))


@pytest.mark.parametrize("name", ALL)
def test_saved_file_gives_the_latent_of_the_saved_model(comfy, sample, wan, name):
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, name)
    before = graphs.save(graph, graphs.sample(graph, model, "wan"))
    path = graph.add("LowBitSaveModel", model=model, filename_prefix=f"diffusion_models/{name}")
    shown = graph.add("PreviewAny", source=path)[0]
    entry = comfy.run(graph)
    before = comfy.latent(entry, before)
    file = comfy.offer(comfy.text(entry, shown), f"saved_{name}.safetensors")

    stored = sample(lambda graph: graphs.load_lowbit(graph, file, "as_stored"))
    assert torch.equal(stored, before)
    if name not in NOT_FOR_THE_STOCK_LOADER:
        stock = sample(lambda graph: graphs.load(graph, file))
        assert difference(stock, before) < formats.get(name).max_error


def test_report_names_the_format_and_draws_a_plot(comfy, wan):
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, "int8_convrot")
    report = graph.add("LowBitModelReport", model=model)
    text = graph.add("PreviewAny", source=report)[0]
    plot = graph.add("PreviewImage", images=[report[0], 1])[0]
    entry = comfy.run(graph)
    assert "int8_convrot" in comfy.text(entry, text)
    assert entry["outputs"][plot]["images"]


@pytest.mark.parametrize("name", some(QWEN_QUICK))
def test_qwen_image_of_full_width_samples_in_the_format(sample, qwen_image, name):
    bf16 = sample(lambda graph: graphs.load(graph, qwen_image), "qwen_image")
    latent = sample(lambda graph: graphs.load_lowbit(graph, qwen_image, name), "qwen_image")
    assert 0 < difference(latent, bf16) < tolerance(name)


def test_interrupt_stops_quantizing_and_the_next_prompt_works(comfy, sample, qwen_image, wan):
    # loaded and cached by the server, so that the next prompt begins with quantizing
    sample(lambda graph: graphs.load(graph, qwen_image), "qwen_image")
    graph = graphs.Graph()
    model = graphs.quantize(graph, graphs.load(graph, qwen_image), SLOW_FORMAT)
    graphs.save(graph, graphs.sample(graph, model, "qwen_image"))
    prompt_id = comfy.submit(graph)
    while not comfy.is_running(prompt_id):
        time.sleep(0.01)
    time.sleep(0.5)
    comfy.interrupt()
    with pytest.raises(PromptInterrupted, match="LowBitQuantizeModel"):
        comfy.wait(prompt_id, STOP_TIMEOUT_S)

    def quantized(graph):
        return graphs.quantize(graph, graphs.load(graph, wan), SLOW_FORMAT)

    assert sample(quantized).isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "int7"}, "int7"),
        ({"recipe": "flux"}, "flux"),
        ({"model_name": "absent.safetensors"}, "absent.safetensors"),
        ({"keep": "("}, "regular expression"),
    ],
)
def test_wrong_input_is_refused_by_name(comfy, wan, wrong, message):
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, "int8")
    graph[model[0]]["inputs"] |= wrong
    graphs.save(graph, graphs.sample(graph, model, "wan"))
    with pytest.raises(PromptError, match=message):
        comfy.run(graph)


def test_quantizing_nothing_is_an_error(comfy, wan):
    graph = graphs.Graph()
    model = graphs.quantize(graph, graphs.load(graph, wan), "int8", keep=".")
    graphs.save(graph, graphs.sample(graph, model, "wan"))
    with pytest.raises(PromptError, match="nothing to quantize to int8"):
        comfy.run(graph)
