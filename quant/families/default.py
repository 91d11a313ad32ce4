"""Any other diffusion transformer, cautiously: the large linear layers of its block stacks.

The names are those of the host's other transformers (comfy/ldm/: Flux, HunyuanVideo, SD3, Lumina,
Cosmos, Kandinsky, …): a stack is "…blocks" or "…layers" at the top level.
"""

import re
from collections.abc import Iterable

from .base import Family, Rule, Shapes

# Stacks that read the prompt, a control image or another input rather than the noisy latent.
SIDE_STACK = r"(?:text|txt|context|audio|vision|llm|control|adapter|encoder|refiner)"
STACK = rf"(?!\w*{SIDE_STACK})\w*(?:blocks|layers)\."


def recognise(shapes: Shapes) -> str:
    """ "dit" for a model with a stack of at least two blocks, else "unknown"."""
    return "dit" if FAMILY.count_blocks(shapes) >= 2 else "unknown"


def _rule(words: str, reason: str) -> Rule:
    return Rule(re.compile(words, re.IGNORECASE), reason)


# A gate that stands before "_proj" or "_up" is half of a gated MLP, not a router.
NEVER = (
    _rule(r"modulation|ada_?ln|(?:^|[._])mod(?:[._]|\d|$)|adain", "modulation is never quantized"),
    _rule(r"norm", "norms are never quantized"),
    _rule(r"embed|time|guidance|vector", "embeddings and conditioning are never quantized"),
    _rule(r"router|(?:^|[._])gates?(?![a-z]|_(?:up|proj))", "gates are never quantized"),
    _rule(r"head|final|proj_out", "output layers are never quantized"),
)

# Sets of names by which the host knows diffusers' models that it converts while it loads them
# (its model_detection.convert_diffusers_mmdit): AuraFlow, PixArt, Z-Image, Flux, SD3.
CONVERTED = (
    {"joint_transformer_blocks.0.attn.add_k_proj.weight"},
    {"adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"},
    {"noise_refiner.0.attention.norm_k.weight"},
    {"x_embedder.weight", "single_transformer_blocks.0.attn.norm_k.weight"},
    {"transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"},
)


def refused(names: Iterable[str]) -> str | None:
    """Why a diffusers-named file cannot be quantized: fusing its layers would lose their scales."""
    present = set(names)
    if any(needed <= present for needed in CONVERTED):
        return (
            "it bears diffusers' names, and ComfyUI fuses its layers while it loads them, which "
            "quantized layers do not survive; quantize a file in ComfyUI's own names, or the "
            "loaded model"
        )
    return None


FAMILY = Family(
    name="default",
    title="Other diffusion transformer",
    recognise=recognise,
    quantized=re.compile(rf"{STACK}\d+\.[\w.]+"),
    stack=re.compile(STACK),
    never=NEVER,
    min_features=256,
    refused=refused,
    fallback=True,
)
