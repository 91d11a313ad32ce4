"""The host alone, without the pack's nodes: the ground the other host tests stand on."""

import pytest
import torch

from tests.host import graphs
from tests.host.server import PACK_FOLDER, PromptError


def test_pack_loads_from_a_folder_with_a_dash(comfy):
    log = comfy.log_path.read_text()
    assert "IMPORT FAILED" not in log
    assert PACK_FOLDER in log


@pytest.mark.parametrize(
    ("model", "family"), [("wan", "wan"), ("wan_i2v", "wan"), ("qwen_image", "qwen_image")]
)
def test_samples_finite_latents_that_repeat_bit_for_bit(sample, request, model, family):
    name = request.getfixturevalue(model)
    first, second = (sample(lambda graph: graphs.load(graph, name), family) for _ in range(2))
    assert first.isfinite().all()
    assert first.std() > 0.1
    assert torch.equal(first, second)


def test_another_seed_gives_another_latent(sample, wan):
    first, second = (
        sample(lambda graph: graphs.load(graph, wan), seed=seed, cfg=2.0) for seed in (1, 2)
    )
    assert not torch.allclose(first, second)


def test_lora_moves_the_latent_and_leaves_the_model_as_it_was(sample, wan, wan_lora):
    def with_lora(graph):
        return graphs.lora(graph, graphs.load(graph, wan), wan_lora, 1.0)

    plain = sample(lambda graph: graphs.load(graph, wan))
    moved = sample(with_lora)
    again = sample(lambda graph: graphs.load(graph, wan))
    assert (moved - plain).norm() > 0.01 * plain.norm()
    assert torch.equal(plain, again)


def test_refused_prompt_says_which_input_is_wrong(comfy):
    graph = graphs.Graph()
    graphs.save(graph, graphs.sample(graph, graphs.load(graph, "absent.safetensors"), "wan"))
    with pytest.raises(PromptError, match="unet_name"):
        comfy.submit(graph)
