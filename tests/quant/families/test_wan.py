import pytest

from lowbit.quant import families

WAN = families.get("wan")
D = 5120

BASE = {
    "head.modulation": (1, 2, 256),
    "head.head.weight": (64, 256),
    "patch_embedding.weight": (256, 16, 1, 2, 2),
    "blocks.0.ffn.0.weight": (512, 256),
    "blocks.1.ffn.0.weight": (512, 256),
}
IMAGE = {"img_emb.proj.0.bias": (1280,)}
CONTROL = {"control_adapter.conv.weight": (256, 1536, 2, 2)}

VARIANTS = {
    "t2v": {},
    "i2v": IMAGE,
    "flf2v": IMAGE | {"img_emb.emb_pos": (1, 514, 1280)},
    "i2v_2.2": {"patch_embedding.weight": (256, 36, 1, 2, 2)},
    "ti2v_5b": {
        "patch_embedding.weight": (256, 48, 1, 2, 2),
        "head.head.weight": (192, 256),
    },
    "vace": {"vace_patch_embedding.weight": (256, 96, 1, 2, 2)},
    "camera": CONTROL | IMAGE,
    "camera_2.2": CONTROL,
    "s2v": {"casual_audio_encoder.encoder.final_linear.weight": (256, 256)},
    "humo": {"audio_proj.audio_proj_glob_1.layer.bias": (512,)},
    "animate": IMAGE | {"face_adapter.fuser_blocks.0.k_norm.weight": (128,)},
    "scail": IMAGE | {"patch_embedding_pose.weight": (256, 20, 1, 2, 2)},
    "scail2": IMAGE
    | {
        "patch_embedding_pose.weight": (256, 20, 1, 2, 2),
        "patch_embedding_mask.weight": (256, 28, 1, 2, 2),
    },
    "wandancer": IMAGE | {"patch_embedding_global.weight": (256, 16, 1, 2, 2)},
}

ATTENTION = [f"{kind}_attn.{letter}" for kind in ("self", "cross") for letter in "qkvo"]
LINEARS = [*ATTENTION, "cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]

KEPT = {
    "patch_embedding": "embeddings",
    "vace_patch_embedding": "embeddings",
    "patch_embedding_mask": "embeddings",
    "patch_embedding_global": "embeddings",
    "text_embedding.0": "embeddings",
    "text_embedding.2": "embeddings",
    "time_embedding.2": "embeddings",
    "img_emb.proj.1": "embeddings",
    "img_emb_refimage.proj.3": "embeddings",
    "img_emb.emb_pos": "embeddings",
    "time_projection.1": "modulation",
    "blocks.20.modulation": "modulation",
    "head.modulation": "modulation",
    "head.head": "head",
    "head_global.head": "head",
    "blocks.20.norm3": "norms",
    "blocks.20.self_attn.norm_q": "norms",
    "blocks.20.cross_attn.norm_k_img": "norms",
    "ref_conv": "reference",
    "cond_encoder": "reference",
    "frame_packer.proj_2x": "reference",
    "trainable_cond_mask": "reference",
    "control_adapter.residual_blocks.0.conv1": "camera",
    "patch_embedding_pose": "pose",
    "pose_patch_embedding": "pose",
    "face_adapter.fuser_blocks.3.linear1_kv": "face",
    "face_encoder.out_proj": "face",
    "motion_encoder.enc.fc.0": "face",
    "casual_audio_encoder.encoder.final_linear": "audio",
    "audio_injector.injector.0.q": "audio",
    "audio_injector.injector_adain_layers.0.linear": "audio",
    "audio_proj.audio_proj_glob_3.layer": "audio",
    "blocks.20.audio_cross_attn_wrapper.audio_cross_attn.k": "audio",
    "blocks.20.audio_cross_attn.kv_linear": "audio",
    "music_injector.injector.0.o": "audio",
    "music_encoder.0.linear1": "audio",
    "music_projection": "audio",
    "vace_blocks.0.before_proj": "VACE",
    "vace_blocks.7.after_proj": "VACE",
    "blocks.20.cam_encoder": "wan family",
    "blocks.20.self_attn.lora_A": "wan family",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_recognised(variant):
    found = families.recognise(BASE | VARIANTS[variant])
    assert (found.family.name, found.variant, found.blocks) == ("wan", variant, 2)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_prefixes_are_taken_off(prefix):
    found = families.recognise({prefix + key: shape for key, shape in BASE.items()})
    assert found.family is WAN
    assert found.prefix == prefix
    assert found.renamed == {prefix + key: key for key in BASE}


def test_other_models_in_a_checkpoint_are_left_out():
    shapes = {"model.diffusion_model." + key: shape for key, shape in BASE.items()}
    found = families.recognise(shapes | {"vae.conv1.weight": (96, 3, 3, 3, 3)})
    assert "vae.conv1.weight" not in found.renamed
    assert len(found.renamed) == len(BASE)


def test_a_head_alone_is_not_a_wan_model():
    assert WAN.recognise({"head.modulation": (1, 2, 256)}) is None


@pytest.mark.parametrize("layer", LINEARS)
@pytest.mark.parametrize("stack", ["blocks", "vace_blocks"])
def test_linear_layers_of_inner_blocks_are_quantized(stack, layer):
    decision = WAN.decide(f"{stack}.5.{layer}", (D, D), 40)
    assert (decision.action, decision.reason) == ("quantize", "")


@pytest.mark.parametrize("layer", KEPT)
def test_other_layers_are_kept_with_their_reason(layer):
    decision = WAN.decide(layer, (D, D), 40)
    assert decision.action == "keep"
    assert KEPT[layer] in decision.reason


def test_a_weight_that_is_not_2d_is_kept():
    decision = WAN.decide("blocks.5.ffn.0", (D, D, 1, 1), 40)
    assert decision.action == "keep"
    assert "4 dimensions" in decision.reason


def test_of_40_blocks_the_outer_six_stay_in_8_bits():
    t2v = [*ATTENTION, "ffn.0", "ffn.2"]
    layers = [f"blocks.{i}.{layer}" for i in range(40) for layer in t2v]
    decisions = {layer: WAN.decide(layer, (D, D), 40) for layer in layers}
    eight = {layer for layer, decision in decisions.items() if decision.action == "eight_bit"}
    assert len(layers) == 400
    assert len(eight) == 60
    assert {int(layer.split(".")[1]) for layer in eight} == {0, 1, 2, 37, 38, 39}
    assert all(decisions[layer].reason for layer in eight)


def test_the_vace_branch_has_no_8_bit_ends():
    assert WAN.decide("vace_blocks.0.ffn.0", (D, D), 40).action == "quantize"


@pytest.mark.parametrize(("blocks", "action"), [(1, "quantize"), (8, "quantize"), (9, "eight_bit")])
def test_only_stacks_above_8_blocks_have_8_bit_ends(blocks, action):
    assert WAN.decide("blocks.0.ffn.0", (512, 256), blocks).action == action


def test_diffusers_animate_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="original"):
        families.recognise(BASE | IMAGE | {"face_adapter.0.to_k.weight": (256, 256)})


def test_fused_projections_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="unfuse_projections"):
        families.recognise(BASE | {"blocks.0.attn1.to_qkv.weight": (768, 256)})
