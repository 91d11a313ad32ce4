import pytest

from lowbit.quant import families

QWEN = families.get("qwen_image")
D = 3072

BASE = {
    "img_in.weight": (D, 64),
    "txt_norm.weight": (3584,),
    "proj_out.weight": (64, D),
    "transformer_blocks.0.attn.norm_added_q.weight": (128,),
}

VARIANTS = {
    "t2i": {},
    "edit_2511": {"__index_timestep_zero__": (0,)},
    "layered": {"time_text_embed.addition_t_embedding.weight": (2, D)},
}

LOOKALIKES = {
    "lens": {"transformer_blocks.0.img_mlp.w1.weight": (D, D)},
    "mage_flow": {"txt_norm.weight": (2560,), "proj_out.weight": (128, D)},
    "controlnet": {"controlnet_blocks.0.weight": (D, D)},
}

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
LINEARS = [
    *(f"attn.{name}" for name in (*PROJECTIONS, "to_out.0", "to_add_out")),
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
]

KEPT = {
    "img_in": "embeddings",
    "txt_in": "embeddings",
    "time_text_embed.timestep_embedder.linear_1": "embeddings",
    "time_text_embed.addition_t_embedding": "embeddings",
    "txt_norm": "norms",
    "norm_out.linear": "norms",
    "transformer_blocks.9.attn.norm_added_k": "norms",
    "transformer_blocks.9.img_mod.1": "modulation",
    "transformer_blocks.9.txt_mod.1": "modulation",
    "proj_out": "output",
    "controlnet_x_embedder": "qwen_image family",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_recognised(variant, prefix):
    shapes = {prefix + key: shape for key, shape in (BASE | VARIANTS[variant]).items()}
    found = families.recognise(shapes)
    assert (found.family, found.variant, found.prefix, found.blocks) == (QWEN, variant, prefix, 1)


@pytest.mark.parametrize("model", LOOKALIKES)
def test_models_with_the_same_keys_are_not_taken_for_it(model):
    assert families.recognise(BASE | LOOKALIKES[model]).family.name == "default"


def test_diffusers_has_the_same_names():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the demo extra")
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel(num_layers=1, num_attention_heads=2)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = families.recognise(shapes)
    assert found.family is QWEN
    assert found.renamed == {key: key for key in shapes}
    layers = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]
    quantized = {
        layer
        for layer in layers
        if QWEN.decide(layer, shapes[f"{layer}.weight"], 1).action != "keep"
    }
    assert quantized == {f"transformer_blocks.0.{layer}" for layer in LINEARS}


@pytest.mark.parametrize("layer", [layer for layer in LINEARS if layer != "img_mlp.net.2"])
def test_linear_layers_of_inner_blocks_are_quantized(layer):
    decision = QWEN.decide(f"transformer_blocks.9.{layer}", (D, D), 60)
    assert (decision.action, decision.reason) == ("quantize", "")


@pytest.mark.parametrize("layer", KEPT)
def test_other_layers_are_kept_with_their_reason(layer):
    decision = QWEN.decide(layer, (D, D), 60)
    assert decision.action == "keep"
    assert KEPT[layer] in decision.reason


def test_of_60_blocks_three_and_each_image_mlp_output_stay_in_8_bits():
    layers = [f"transformer_blocks.{i}.{layer}" for i in range(60) for layer in LINEARS]
    decisions = {layer: QWEN.decide(layer, (D, D), 60) for layer in layers}
    eight = {layer for layer, decision in decisions.items() if decision.action == "eight_bit"}
    assert len(layers) == 720
    assert len(eight) == 3 * len(LINEARS) + 57
    whole = {layer.split(".")[1] for layer in eight if layer.endswith("attn.to_q")}
    assert whole == {"0", "58", "59"}
    assert all(decisions[layer].reason for layer in eight)


def test_a_short_stack_keeps_only_the_image_mlp_output_in_8_bits():
    actions = {
        layer: QWEN.decide(f"transformer_blocks.0.{layer}", (D, D), 1).action for layer in LINEARS
    }
    assert {layer for layer in LINEARS if actions[layer] == "eight_bit"} == {"img_mlp.net.2"}
