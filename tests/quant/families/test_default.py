import pytest

from lowbit.quant import families

DEFAULT = families.get("default")
BLOCKS = 38

# Layers of the host's other transformers.
QUANTIZED = [
    "double_blocks.5.img_attn.qkv",
    "double_blocks.5.txt_mlp.2",
    "single_blocks.5.linear1",
    "transformer_blocks.5.attn.to_out.0",
    "single_transformer_blocks.5.proj_mlp",
    "joint_blocks.5.x_block.mlp.fc1",
    "layers.5.attention.qkv",
    "layers.5.feed_forward.w2",
    "layers.5.mlp.gate_proj",
    "blocks.5.cross_attn.k_proj",
    "visual_transformer_blocks.5.feed_forward.in_layer",
]

KEPT = {
    "double_blocks.5.img_mod.lin": "modulation",
    "single_blocks.5.modulation.lin": "modulation",
    "layers.5.adaLN_modulation.1": "modulation",
    "blocks.5.adaln_modulation_mlp.1": "modulation",
    "transformer_blocks.5.norm1.linear": "norms",
    "single_transformer_blocks.5.proj_out": "output",
    "blocks.5.moe.gate": "gates",
    "blocks.5.router.proj": "gates",
    "blocks.5.to_gate_logits": "gates",
    "final_layer.linear": "output",
    "time_in.in_layer": "conditioning",
    "guidance_in.in_layer": "conditioning",
    "vector_in.out_layer": "conditioning",
    "x_embedder": "embeddings",
    "img_in": "default family",
    "txt_in.net.0.proj": "default family",
    "context_refiner.0.attention.qkv": "default family",
    "text_transformer_blocks.0.feed_forward.in_layer": "default family",
    "llm_adapter.blocks.0.self_attn.q_proj": "default family",
    "controlnet_blocks.5.linear": "default family",
}


def test_an_unknown_transformer_falls_to_default():
    shapes = {
        f"model.diffusion_model.{stack}.{i}.linear1.weight": (512, 512)
        for stack, count in (("double_blocks", 3), ("single_blocks", 5))
        for i in range(count)
    }
    found = families.recognise(shapes | {"vae.decoder.conv_in.weight": (512, 16, 3, 3)})
    assert (found.family, found.variant, found.blocks) == (DEFAULT, "dit", 5)
    assert found.prefix == "model.diffusion_model."
    assert len(found.renamed) == len(shapes)


@pytest.mark.parametrize("prefix", ["", "net.", "model.", "diffusion_model."])
def test_prefixes_are_taken_off(prefix):
    shapes = {f"{prefix}blocks.{i}.mlp.weight": (512, 512) for i in range(3)}
    assert families.recognise(shapes).prefix == prefix


@pytest.mark.parametrize("shapes", [{}, {"conv.weight": (8, 8, 3, 3)}])
def test_a_file_without_a_stack_is_unknown(shapes):
    found = families.recognise(shapes)
    assert (found.family, found.variant, found.prefix, found.blocks) == (DEFAULT, "unknown", "", 0)


@pytest.mark.parametrize("layer", QUANTIZED)
def test_large_linear_layers_of_the_stack_are_quantized(layer):
    assert DEFAULT.decide(layer, (3072, 3072), BLOCKS).action == "quantize"


@pytest.mark.parametrize("layer", KEPT)
def test_other_layers_are_kept_with_their_reason(layer):
    decision = DEFAULT.decide(layer, (3072, 3072), BLOCKS)
    assert decision.action == "keep"
    assert KEPT[layer] in decision.reason


@pytest.mark.parametrize("shape", [(255, 512), (512, 255), (512,), (512, 512, 3)])
def test_small_or_folded_weights_are_kept(shape):
    decision = DEFAULT.decide("blocks.5.mlp", shape, BLOCKS)
    assert decision.action == "keep"
    assert decision.reason


@pytest.mark.parametrize(
    ("index", "action"), [(0, "eight_bit"), (1, "quantize"), (37, "eight_bit")]
)
def test_the_first_and_last_block_stay_in_8_bits(index, action):
    assert DEFAULT.decide(f"single_blocks.{index}.linear1", (512, 512), BLOCKS).action == action
