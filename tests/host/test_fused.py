"""Attention layers in a real ComfyUI whose norm and rotary embedding join the attention."""

from pathlib import Path

import pytest

from tests.host.server import session

SESSION = Path(__file__).with_name("fused_session.py")
MODELS = {"wan": "WanSelfAttention", "qwen_image": "Attention"}
# Latents of two samplings that round to 16 bits in another order.
ROUNDING = 0.003
# Norms that join products: two of each block, or of its image and its text.
NORMS = {"wan": 4, "wan_vace": 6, "qwen_image": 4, "qwen_edit": 4}


@pytest.fixture(scope="module")
def sessions():
    return session(SESSION)


@pytest.fixture(params=MODELS)
def seen(sessions, request):
    return request.param, sessions[request.param]


def test_layers_are_replaced_while_the_model_runs(seen):
    name, row = seen
    assert (row["inside"], row["after"]) == (f"Fused{MODELS[name]}", MODELS[name])


def test_rotary_embedding_is_left_to_the_attention_and_the_latent_is_the_same(seen):
    _, row = seen
    fused, apart, _ = row["rotary"]
    assert fused == 0 < apart
    assert 0 < row["against apart"] < ROUNDING
    assert row["changed"] < 1.5 * row["apart"]


def test_patch_that_wants_q_and_k_gets_them_as_the_host_has_them(seen):
    _, row = seen
    _, apart, with_patch = row["rotary"]
    assert with_patch == apart
    assert row["with patch equals apart"]


def test_order_of_the_nodes_does_not_matter(seen):
    _, row = seen
    assert row["order of nodes"] == 0
    assert row["rotary quantized"] == [0, 0]


# With LoRAs the same norms: their first matrices multiply what is quantized.
@pytest.mark.parametrize("which", ["quantized", "lora"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_gates_and_residuals_join_the_products_of_quantized_blocks(sessions, name, which):
    blocks = sessions[name]["blocks"]
    assert blocks[f"{which}, joined: norms"] == blocks[f"{which}, apart: norms"] - NORMS[name]
    # Nothing is rounded between norm and quantization, so that a few values fall to another step.
    assert 0 < blocks[f"{which}: layers"] < ROUNDING
    assert blocks[f"{which}, joined: error"] < 1.05 * blocks[f"{which}, apart: error"]


def test_another_branchs_patch_that_is_loaded_does_not_keep_a_feed_forward_plain(sessions):
    assert sessions["lent"] == "FusedWanFeedForward"


def test_lengths_of_text_take_two_graphs_of_a_whole_qwen_image(sessions):
    """The second length compiles one for all that follow."""
    assert sessions["lengths"] == {"graphs": [1, 2, 2], "difference": 0}


def test_references_at_a_time_of_their_own_are_felt(sessions):
    assert sessions["qwen_edit"]["felt"] > 0.1


@pytest.mark.parametrize("name", NORMS)
def test_lora_beside_quantized_blocks_is_felt(sessions, name):
    blocks = sessions[name]["blocks"]
    assert blocks["lora changed"] > 10 * blocks["lora, joined: error"]


def test_differences_of_norms_act_where_the_norms_join_the_attention(seen):
    _, row = seen
    norms = row["norms"]
    assert norms["felt"] > 0.1 and norms["gone"]
    assert norms["rotary"] == {"merged": 0, "added": 0}
    assert max(norms["against merged"], norms["against apart"]) < ROUNDING


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_another_nodes_patch_of_a_layer_stays_and_nothing_of_it_remains(seen, order):
    name, row = seen
    strangers = row["strangers"]
    got = strangers[order]
    assert strangers["theirs changes"] > 0.05
    assert got["hits"] > 0 and got["difference"] < 0.05
    assert got["hits beside"] == 0 and got["ours beside"] < ROUNDING
    assert got["plain after"]
    # Nor of ours: the layer can be replaced again.
    assert got["ours after"] == f"Fused{MODELS[name]}"
