"""Wan 2.1 and 2.2, in all the variants of the host, by the host's names or diffusers'.

Source: ComfyUI 0.33 comfy/model_detection.py (variants) and comfy/ldm/wan/ (layers);
diffusers models/transformers/transformer_wan*.py and convert_wan_transformer_to_diffusers in
loaders/single_file_utils.py (its names; renamed here in the other direction).
"""

import re

from .base import Family, FeedForward, LayerShape, Rule, Shapes

# (key that only this variant has, variant), in the host's order of detection.
MARKS = (
    ("casual_audio_encoder.encoder.final_linear.weight", "s2v"),
    ("audio_proj.audio_proj_glob_1.layer.bias", "humo"),
    ("face_adapter.fuser_blocks.0.k_norm.weight", "animate"),
    ("patch_embedding_mask.weight", "scail2"),
    ("patch_embedding_pose.weight", "scail"),
    ("patch_embedding_global.weight", "wandancer"),
)

IMAGE_EMBEDDING = "img_emb.proj.0.bias"
# Output rows of the head per latent channel: one patch is 1 x 2 x 2.
PATCH = 4
# Latent channels of the Wan 2.2 VAE; only the 5B model uses it.
WAN22_LATENT = 48
# Noise, mask and first frame: 16 + 4 + 16 channels.
IMAGE_TO_VIDEO_IN = 36


def recognise(shapes: Shapes) -> str | None:
    """The variant, mostly by the host's name for it, or None if this is not a Wan model.

    Beside the host's: "ti2v_5b"; "flf2v" (first and last frame); "i2v_2.2", which is image to
    video without an image encoder and "t2v" to the host. Animate 2 and FlowRVS differ from
    "i2v" in metadata alone and are called so.
    """
    if "head.modulation" not in shapes or not any(key.startswith("blocks.0.") for key in shapes):
        return None
    has_image = IMAGE_EMBEDDING in shapes
    if "vace_patch_embedding.weight" in shapes:
        return "vace"
    if "control_adapter.conv.weight" in shapes:
        return "camera" if has_image else "camera_2.2"
    for key, variant in MARKS:
        if key in shapes:
            return variant
    if has_image:
        return "flf2v" if "img_emb.emb_pos" in shapes else "i2v"
    return _without_image_encoder(shapes)


def _without_image_encoder(shapes: Shapes) -> str:
    """The variant of a model that differs by its number of latent channels only."""
    if shapes.get("head.head.weight", (0,))[0] == PATCH * WAN22_LATENT:
        return "ti2v_5b"
    patch = shapes.get("patch_embedding.weight", ())
    return "i2v_2.2" if patch[1:2] == (IMAGE_TO_VIDEO_IN,) else "t2v"


ATTENTION = r"(?:self_attn\.[qkvo]|cross_attn\.(?:[qkvo]|[kv]_img))"
BLOCK = r"(?:vace_)?blocks\.\d+"
END = r"(?=\.|$)"


def _rename(pattern: str, replacement: str) -> tuple[re.Pattern[str], str]:
    return re.compile(f"^{pattern}{END}"), replacement


# In a diffusers block the norm with weights, before the cross-attention, is norm2; the host
# numbers the same one norm3. The other two have no weights in either.
RENAMES = (
    _rename(r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    _rename(r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    _rename(r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    _rename(r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    _rename(r"condition_embedder\.time_proj", "time_projection.1"),
    _rename(r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    _rename(r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    _rename(r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    _rename(r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    _rename(r"condition_embedder\.image_embedder\.pos_embed", "img_emb.emb_pos"),
    _rename(rf"({BLOCK})\.attn1", r"\1.self_attn"),
    _rename(rf"({BLOCK})\.attn2", r"\1.cross_attn"),
    _rename(rf"({BLOCK}\.(?:self|cross)_attn)\.to_([qkv])", r"\1.\2"),
    _rename(rf"({BLOCK}\.(?:self|cross)_attn)\.to_out\.0", r"\1.o"),
    _rename(rf"({BLOCK}\.cross_attn)\.add_([kv])_proj", r"\1.\2_img"),
    _rename(rf"({BLOCK}\.cross_attn)\.norm_added_k", r"\1.norm_k_img"),
    _rename(rf"({BLOCK})\.norm2", r"\1.norm3"),
    _rename(rf"({BLOCK})\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    _rename(rf"({BLOCK})\.ffn\.net\.2", r"\1.ffn.2"),
    _rename(rf"({BLOCK})\.scale_shift_table", r"\1.modulation"),
    _rename(r"(vace_blocks\.\d+)\.proj_in", r"\1.before_proj"),
    _rename(r"(vace_blocks\.\d+)\.proj_out", r"\1.after_proj"),
    _rename("scale_shift_table", "head.modulation"),
    _rename("proj_out", "head.head"),
)

UNSUPPORTED = (
    Rule(
        re.compile(rf"{BLOCK}\.\w+\.to_(?:qkv|kv|added_kv)\."),
        "fused projections have no place in ComfyUI's layout. "
        "Call unfuse_projections() in diffusers and save again.",
    ),
    Rule(
        re.compile(r"face_adapter\.\d+\.to_[kv]\."),
        "Wan Animate in diffusers' layout cannot be renamed, as ComfyUI joins these tensors. "
        "Take the file in the original or ComfyUI's layout.",
    ),
)

NEVER = (
    Rule(
        re.compile(r"modulation|^time_projection"),
        "modulation is never quantized",
    ),
    Rule(re.compile(r"norm"), "norms are never quantized"),
    Rule(
        re.compile(r"audio|music|injector"),
        "audio encoders and adapters are never quantized",
    ),
    Rule(
        re.compile(r"^(?:face|motion)_|pose|^control_adapter"),
        "face, pose and camera encoders and adapters are never quantized",
    ),
    Rule(
        re.compile(r"^(?:text|time|img|patch|vace_patch)_emb"),
        "embeddings are never quantized",
    ),
    Rule(
        re.compile(r"^(?:ref_conv|cond_encoder|frame_packer|trainable_cond_mask)"),
        "layers that read reference frames are never quantized",
    ),
    Rule(re.compile(r"^head"), "the head is never quantized"),
    Rule(
        re.compile(r"(?:before|after)_proj$"),
        "the way in and out of the VACE branch is never quantized",
    ),
)

# 81 frames are 21 latent frames, 121 are 31. Tokens at 832x480: 21 * 30 * 52; at 1280x720:
# 21 * 45 * 80; 5B, whose VAE halves each side once more, at 1280x704: 31 * 22 * 40.
TOKENS_480P = 32_760
TOKENS_720P = 75_600
TOKENS_5B = 27_280


def _shapes(width: int, ffn: int, *tokens: int) -> tuple[LayerShape, ...]:
    return (
        LayerShape("self_attn.q", width, width, tokens),
        LayerShape("ffn.0", ffn, width, tokens),
        LayerShape("ffn.2", width, ffn, tokens),
    )


# The VACE branch has no ends to guard: its output reaches the main blocks all along the stack.
FAMILY = Family(
    name="wan",
    title="Wan 2.1 / 2.2",
    recognise=recognise,
    quantized=re.compile(rf"{BLOCK}\.(?:{ATTENTION}|ffn\.[02])"),
    stack=re.compile(r"blocks\."),
    never=NEVER,
    first_eight_bit=3,
    last_eight_bit=3,
    renames=RENAMES,
    unsupported=UNSUPPORTED,
    shape_source=re.compile(r"blocks\.0\.ffn\.0"),
    shared_inputs=(
        ("self_attn.q", "self_attn.k", "self_attn.v"),
        ("cross_attn.k", "cross_attn.v"),
        ("cross_attn.k_img", "cross_attn.v_img"),
    ),
    feed_forwards=(FeedForward("ffn", "0", "2"),),
    shapes={
        "14B": _shapes(5120, 13824, TOKENS_480P, TOKENS_720P),
        "5B": _shapes(3072, 14336, TOKENS_5B),
        "1.3B": _shapes(1536, 8960, TOKENS_480P),
    },
)
