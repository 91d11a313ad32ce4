"""The memory of a real ComfyUI: two experts in turn, and the same work over and over."""

import math
import sys
import threading
from contextlib import contextmanager

import pytest

from lowbit.quant.checkpoint import Checkpoint
from lowbit.quant.checkpoint.stored import stored_layers
from lowbit.quant.quantize_file import quantize_file
from tests.checkpoints import write_wan
from tests.host import graphs

EXPERTS = ("high_noise", "low_noise")
WIDTH, FFN, LAYERS = 1536, 4096, 4
SAMPLE_S = 0.005
# What Python, torch and the allocator add between two prompts of the same kind.
NOISE_BYTES = 64 << 20
WARM_UP, CYCLES, PART = 10, 50, 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads memory from Linux's /proc"),
]


@contextmanager
def peak(comfy):
    """Yield a list that holds, afterwards, the most memory that the server had meanwhile."""
    result, done = [comfy.memory_bytes()], threading.Event()

    def watch():
        while not done.wait(SAMPLE_S):
            result[0] = max(result[0], comfy.memory_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()


@pytest.fixture
def experts(comfy, tmp_path):
    """Two NVFP4 files of a Wan that is large beside everything else in the process."""
    for seed, name in enumerate(EXPERTS):
        source = write_wan(
            tmp_path / "wan.safetensors", dim=WIDTH, ffn=FFN, layers=LAYERS, seed=seed
        )
        quantize_file(source, comfy.model_path(f"{name}.safetensors"), "nvfp4")
        source.unlink()
    yield [f"{name}.safetensors" for name in EXPERTS]
    for name in EXPERTS:
        comfy.model_path(f"{name}.safetensors").unlink()


def loaded_bytes(checkpoint) -> tuple[int, int]:
    """Return (bytes of a model in the host on a CPU, elements of its quantized weights).

    What is not quantized is float32 there.
    """
    layers = stored_layers(checkpoint).values()
    names = {name for layer in layers for name in layer.parts.values()}
    stored = sum(checkpoint[name].size_bytes for name in names)
    elements = [math.prod(layer.logical_shape(checkpoint)) for layer in layers]
    return stored + 2 * (checkpoint.size_bytes - stored), sum(elements)


def test_two_experts_take_turns_without_either_being_dequantized(comfy, sample, wan, experts):
    sample(lambda graph: graphs.load_lowbit(graph, wan, "nvfp4"))
    before = comfy.memory_bytes()

    def switch():
        graph = graphs.Graph()
        models = [graphs.load_lowbit(graph, name, "as_stored") for name in experts]
        latent = None
        for model in [*models, models[0]]:
            start = latent and graph.add("LatentMultiply", samples=latent, multiplier=0.0)
            latent = graphs.sample(graph, model, "wan", start=start, steps=1)
        graphs.save(graph, latent)
        comfy.run(graph)

    switch()
    with peak(comfy) as most:
        switch()
    grown = most[0] - before
    loaded, elements = loaded_bytes(Checkpoint(comfy.model_path(experts[0])))
    print(
        f"two NVFP4 experts: {grown / 1e6:.0f} MB more at the peak of switching; as loaded they "
        f"are {2 * loaded / 1e6:.0f} MB, one of them in bfloat16 {2 * elements / 1e6:.0f} MB"
    )
    # One layer is dequantized to float32 while it multiplies, with its codes before.
    allowed = 2 * loaded + 4 * 4 * WIDTH * FFN + NOISE_BYTES
    assert grown < allowed
    # One expert kept in bfloat16 would show, and be it the only one.
    assert allowed < 2 * loaded + 2 * elements


def cycle(comfy, wan, number):
    """Load, quantize, sample and unload; another `keep` makes the server load again."""
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, "as_stored", keep=f"nothing{number}")
    model = graphs.quantize(graph, model, "int8_convrot")
    latent = graphs.sample(graph, model, "wan")
    graphs.save(graph, graphs.unload(graph, latent))
    comfy.run(graph)


def test_fifty_cycles_do_not_grow(comfy, wan):
    used = []
    for number in range(WARM_UP + CYCLES):
        cycle(comfy, wan, number)
        used.append(comfy.memory_bytes())
    first, last = used[WARM_UP : WARM_UP + PART], used[-PART:]
    growth = (sum(last) - sum(first)) / PART
    cycles = CYCLES - PART
    print(
        f"{CYCLES} cycles: {growth / 1e6:+.2f} MB from the first ten to the last, "
        f"{growth / cycles / 1e3:+.1f} kB a cycle, {used[-1] / 1e6:.0f} MB in use"
    )
    # A model that stayed would be its whole file in each cycle.
    size = Checkpoint(comfy.model_path(wan)).size_bytes
    assert growth < cycles * size / 100
