"""The attention node in a real ComfyUI: what it changes, and what it leaves as it was."""

import pytest
import torch

from lowbit.ops.attention.modes import MODES
from tests.host import graphs
from tests.host.server import PromptError

IMAGE_TOKENS = 257
LOWBIT = [f"lowbit_{name}" for name in MODES]


@pytest.fixture(scope="module")
def plain(sample, wan):
    """The latent of the model without the node."""
    return sample(lambda graph: graphs.load(graph, wan))


@pytest.fixture
def sampled(sample, wan):
    """A function (mode, **inputs of the node) -> latent of the small Wan."""

    def run(mode: str, **options) -> torch.Tensor:
        return sample(
            lambda graph: graphs.attention(graph, graphs.load(graph, wan), mode, **options)
        )

    return run


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("mode", LOWBIT)
def test_modes_change_the_latent_by_less_than_their_error(sampled, plain, mode):
    assert 0 < difference(sampled(mode), plain) < MODES[mode.removeprefix("lowbit_")].max_error


@pytest.mark.parametrize("mode", ["sdpa", "auto"])
def test_torchs_own_attention_gives_the_same_latent(sampled, plain, mode):
    assert torch.equal(sampled(mode), plain)


def test_fp4_samples_but_for_the_first_and_the_last_step(sample, wan):
    def attended(graph):
        return graphs.attention(graph, graphs.load(graph, wan), "lowbit_fp4")

    for steps, changes in ((2, False), (3, True)):
        want = sample(lambda graph: graphs.load(graph, wan), steps=steps)
        wrong = difference(sample(attended, steps=steps), want)
        # One step of three, of a small part of what is added to the latent.
        assert 0 < wrong < 0.05 if changes else wrong == 0


def test_layers_blocks_and_steps_add_up(sampled, plain):
    everything = sampled("lowbit_exact")
    for parts in (
        {"layers": "self"},
        {"layers": "cross"},
        {"blocks": "0"},
        {"blocks": "1-"},
        {"start_percent": 0.5},
        {"end_percent": 0.5},
    ):
        latent = sampled("lowbit_exact", **parts)
        assert not torch.equal(latent, plain), parts
        assert not torch.equal(latent, everything), parts


@pytest.mark.parametrize("parts", [{"end_percent": 0.0}, {"start_percent": 1.0}, {"blocks": "2-"}])
def test_empty_range_gives_the_same_latent(sampled, plain, parts):
    assert torch.equal(sampled("lowbit_exact", **parts), plain)


def test_two_in_a_row_give_what_one_gives(sample, sampled, wan):
    def two(graph):
        model = graphs.attention(graph, graphs.load(graph, wan), "lowbit_exact", blocks="0")
        return graphs.attention(graph, model, "lowbit_exact", blocks="1")

    assert torch.equal(sample(two), sampled("lowbit_exact"))


@pytest.mark.parametrize("node_first", [True, False])
def test_another_branch_is_untouched(comfy, wan, plain, node_first):
    graph = graphs.Graph()
    model = graphs.load(graph, wan)
    branches = {"plain": model, "with the node": graphs.attention(graph, model, "lowbit_exact")}
    saved, start = {}, None
    for branch in sorted(branches, reverse=node_first):
        latent = graphs.sample(graph, branches[branch], "wan", start=start)
        saved[branch] = graphs.save(graph, latent)
        # The next branch begins only once this one has ended, from an empty latent again.
        start = graph.add("LatentMultiply", samples=latent, multiplier=0.0)
    entry = comfy.run(graph)
    assert torch.equal(comfy.latent(entry, saved["plain"]), plain)
    assert difference(comfy.latent(entry, saved["with the node"]), plain) > 0


def test_quantized_model_takes_it(sample, wan):
    def quantized(graph):
        return graphs.load_lowbit(graph, wan, "int8_convrot")

    latent = sample(lambda graph: graphs.attention(graph, quantized(graph), "lowbit_exact"))
    assert 0 < difference(latent, sample(quantized)) < 2 * MODES["exact"].max_error


@pytest.fixture
def image_to_video(sample, wan_i2v):
    """A function (mode or None, **inputs of the node) -> latent of the small I2V, with an image."""

    def run(mode: str | None, **options) -> torch.Tensor:
        def build(graph):
            model = graphs.load(graph, wan_i2v)
            return graphs.attention(graph, model, mode, **options) if mode else model

        return sample(build, image_tokens=IMAGE_TOKENS)

    return run


def test_image_to_video_takes_it(image_to_video):
    plain = image_to_video(None)
    latent = image_to_video("lowbit_exact", guard="every_call")
    assert 0 < difference(latent, plain) < MODES["exact"].max_error


def test_attention_to_the_image_stays_in_16_bits(image_to_video):
    """The host marks it as not for low precision."""
    plain = image_to_video(None)
    assert torch.equal(image_to_video("lowbit_exact", layers="image_cross"), plain)
    assert torch.equal(image_to_video("sdpa", layers="image_cross"), plain)
    assert not torch.equal(image_to_video("lowbit_exact", layers="cross"), plain)


def test_vace_takes_it(sample, wan_vace):
    def attend(mode, **options):
        return lambda graph: graphs.attention(graph, graphs.load(graph, wan_vace), mode, **options)

    plain = sample(lambda graph: graphs.load(graph, wan_vace))
    assert torch.equal(sample(attend("sdpa")), plain)
    exact = sample(attend("lowbit_exact"))
    assert 0 < difference(exact, plain) < MODES["exact"].max_error
    # VACE's block runs as the first one does; the second block is the same without it.
    second = sample(attend("lowbit_exact", blocks="1"))
    assert difference(second, plain) > 0
    assert not torch.equal(second, exact)


def test_qwen_image_takes_it(sample, qwen_image):
    def load(graph):
        return graphs.load(graph, qwen_image)

    def attend(mode):
        return lambda graph: graphs.attention(graph, load(graph), mode, layers="self")

    for hidden in (0, 5):
        latent = sample(load, "qwen_image", hidden=hidden)
        assert torch.equal(sample(attend("sdpa"), "qwen_image", hidden=hidden), latent)
        exact = sample(attend("lowbit_exact"), "qwen_image", hidden=hidden)
        assert 0 < difference(exact, latent) < MODES["exact"].max_error


def test_rotation_changes_nothing_of_the_exact_reference(sampled):
    """Which is what runs on a CPU; workflows without the input, as all others here, have none."""
    assert torch.equal(sampled("lowbit_exact", rotation="hadamard"), sampled("lowbit_exact"))


def test_older_name_of_a_mode_is_taken(sampled):
    assert torch.equal(sampled("sageattn_3_fp8"), sampled("lowbit_fp8"))


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("kitchen_int8", {}, "kitchen_int8: needs a device of"),
        ("sageattn", {}, "sageattn: needs a device of"),
        ("cudnn", {}, "cudnn: needs a device of"),
        ("sageattn_3_fp4", {}, "sageattn3_fp4: needs a device of"),
        ("sageattn_ultravico", {}, "computes something else"),
        ("fast", {}, "unknown mode 'fast'"),
        ("auto", {"blocks": "first"}, "neither a block nor a range"),
        ("auto", {"start_percent": 0.5, "end_percent": 0.2}, "start to end"),
        ("sdpa", {"rotation": "hadamard"}, "sdpa cannot rotate q and k"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_cannot_run_is_refused_with_the_reason(comfy, wan, mode, options, message):
    graph = graphs.Graph()
    model = graphs.attention(graph, graphs.load(graph, wan), mode, **options)
    graphs.save(graph, graphs.sample(graph, model, "wan"))
    with pytest.raises(PromptError, match=message):
        comfy.run(graph)
