"""Wan files by diffusers' names.

Checked once beyond this: tiny t2v and i2v models give the same output in diffusers and, renamed,
in ComfyUI 0.33, to 8e-6 relative L2 in float32.
"""

import pytest

from lowbit.quant import families

WAN = families.get("wan")

SIZE = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 512, "num_layers": 2}
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 256, "pos_embed_seq_len": 514}


def both(*layers):
    return {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def host_block(block, image):
    """The keys of one block of the host's WanModel."""
    attention = [f"{block}.{kind}_attn" for kind in ("self", "cross")]
    keys = {f"{block}.modulation"} | both(f"{block}.norm3", f"{block}.ffn.0", f"{block}.ffn.2")
    for name in attention:
        keys |= both(*(f"{name}.{letter}" for letter in "qkvo"))
        keys |= {f"{name}.norm_q.weight", f"{name}.norm_k.weight"}
    if image:
        cross = attention[1]
        keys |= both(f"{cross}.k_img", f"{cross}.v_img") | {f"{cross}.norm_k_img.weight"}
    return keys


def host_keys(variant):
    """The state dict of the host's WanModel or VaceWanModel with two layers, by key."""
    image = variant == "flf2v"
    embeddings = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2")
    keys = both("patch_embedding", *embeddings, "time_projection.1", "head.head")
    keys |= {"head.modulation"}
    keys |= host_block("blocks.0", image) | host_block("blocks.1", image)
    if image:
        keys |= both(*(f"img_emb.proj.{i}" for i in (0, 1, 3, 4))) | {"img_emb.emb_pos"}
    if variant == "vace":
        keys |= both("vace_patch_embedding", "vace_blocks.0.before_proj")
        for block in ("vace_blocks.0", "vace_blocks.1"):
            keys |= host_block(block, image=False) | both(f"{block}.after_proj")
    return keys


def diffusers_shapes(variant):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the demo extra")
    with torch.device("meta"):
        if variant == "vace":
            model = diffusers.WanVACETransformer3DModel(vace_layers=[0, 1], **SIZE)
        else:
            model = diffusers.WanTransformer3DModel(**SIZE, **(I2V if variant == "flf2v" else {}))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", ["t2v", "flf2v", "vace"])
def test_diffusers_names_become_the_hosts_one_to_one(variant):
    shapes = diffusers_shapes(variant)
    found = families.recognise(shapes)
    assert (found.family, found.variant, found.blocks) == (WAN, variant, 2)
    assert set(found.renamed) == set(shapes)
    assert len(set(found.renamed.values())) == len(shapes)
    assert set(found.renamed.values()) == host_keys(variant)


@pytest.mark.parametrize("variant", ["t2v", "flf2v", "vace"])
def test_host_names_are_left_alone(variant):
    keys = host_keys(variant)
    assert WAN.rename(keys) == {key: key for key in keys}


def test_the_norm_with_weights_is_norm2_in_diffusers_and_norm3_in_the_host():
    assert WAN.rename(["blocks.0.norm2.weight"]) == {
        "blocks.0.norm2.weight": "blocks.0.norm3.weight"
    }


def test_block_modulation_and_head_modulation_stay_apart():
    assert WAN.rename(["scale_shift_table", "blocks.7.scale_shift_table"]) == {
        "scale_shift_table": "head.modulation",
        "blocks.7.scale_shift_table": "blocks.7.modulation",
    }


def test_layer_names_and_scales_are_renamed_too():
    assert WAN.rename(["blocks.3.attn2.to_out.0", "blocks.3.ffn.net.2.weight_scale"]) == {
        "blocks.3.attn2.to_out.0": "blocks.3.cross_attn.o",
        "blocks.3.ffn.net.2.weight_scale": "blocks.3.ffn.2.weight_scale",
    }


def test_animate_2_of_diffusers_is_renamed():
    key = "blocks.3.self_attn.to_q.weight"
    assert WAN.rename([key]) == {key: "blocks.3.self_attn.q.weight"}
