"""Qwen-Image, its Edit models and Qwen-Image-Layered. diffusers and the host name keys alike.

Source: ComfyUI 0.33 comfy/model_detection.py and comfy/ldm/qwen_image/model.py.
"""

import re

from .base import Family, FeedForward, LayerShape, Rule, Shapes

# Output rows of Mage-Flow's proj_out; Qwen-Image has 64.
MAGE_FLOW_OUT = 128


def recognise(shapes: Shapes) -> str | None:
    """The variant, or None if this is not a Qwen-Image model.

    "t2i" is Qwen-Image and the Edit models to 2509, which have the same keys and shapes.
    "edit_2511" needs ComfyUI's mark in the file: diffusers writes it to its config alone.
    """
    needed = ("txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.norm_added_q.weight")
    if any(key not in shapes for key in needed) or _is_lookalike(shapes):
        return None
    if "time_text_embed.addition_t_embedding.weight" in shapes:
        return "layered"
    return "edit_2511" if "__index_timestep_zero__" in shapes else "t2i"


def _is_lookalike(shapes: Shapes) -> bool:
    """Whether this is Lens, Mage-Flow or a ControlNet, which share the keys of Qwen-Image."""
    return (
        "transformer_blocks.0.img_mlp.w1.weight" in shapes
        or shapes.get("proj_out.weight", (0,))[0] == MAGE_FLOW_OUT
        or any(key.startswith("controlnet_blocks.") for key in shapes)
    )


NEVER = (
    Rule(
        re.compile(r"(?:img|txt)_mod(?:\.|$)"),
        "modulation is never quantized",
    ),
    Rule(re.compile(r"norm"), "norms are never quantized"),
    Rule(
        re.compile(r"^(?:img_in|txt_in|time_text_embed)(?:\.|$)"),
        "embeddings are never quantized",
    ),
    Rule(re.compile(r"^proj_out(?:\.|$)"), "the output layer is never quantized"),
)

ATTENTION = r"attn\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
MLP = r"(?:img|txt)_mlp\.net\.(?:0\.proj|2)"

# Image and text together, as attention sees them: 1024x1024; 1328x1328; the same with one
# reference image.
TOKENS = (4_224, 7_145, 14_290)
WIDTH = 3072
HIDDEN = 4 * WIDTH

FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    recognise=recognise,
    quantized=re.compile(rf"transformer_blocks\.\d+\.(?:{ATTENTION}|{MLP})"),
    stack=re.compile(r"transformer_blocks\."),
    never=NEVER,
    first_eight_bit=1,
    last_eight_bit=2,
    always_eight_bit=(
        Rule(
            re.compile(r"\.img_mlp\.net\.2$"),
            "the image MLP's output layer is never below 8 bits",
        ),
    ),
    shared_inputs=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    feed_forwards=(
        FeedForward("img_mlp", "net.0.proj", "net.2"),
        FeedForward("txt_mlp", "net.0.proj", "net.2"),
    ),
    shapes={
        "20B": (
            LayerShape("attn.to_q", WIDTH, WIDTH, TOKENS),
            LayerShape("img_mlp.net.0.proj", HIDDEN, WIDTH, TOKENS),
            LayerShape("img_mlp.net.2", WIDTH, HIDDEN, TOKENS),
        ),
    },
)
