"""Inputs that several nodes share. The same on every machine: hardware is checked when one runs."""

from ..ops.linear.arithmetic import ARITHMETICS
from ..quant import best, formats, recipe

AUTO, AS_STORED = "auto", "as_stored"
CATEGORY = "LowBit"


def format_input(default: str) -> tuple:
    """Return the `format` input: `as_stored`, then every number format; first `auto` if default."""
    tooltip = (
        "Number format of the weights. int8_convrot: 8 bits, the most exact. fp8_*: 8 bits. "
        "nvfp4, mxfp4, asym_w4a8_int8, convrot_w4a4: 4 bits, the smallest. as_stored: keep what is "
        "there."
    )
    names = [AS_STORED, *formats.names()]
    if default == AUTO:
        tooltip = f"auto: {best.BEST}, or as_stored where the file is quantized already. {tooltip}"
        names.insert(0, AUTO)
    return (names, {"default": default, "tooltip": tooltip})


def arithmetic_input() -> tuple:
    """Return the `arithmetic` input: in which bits 4-bit weights are multiplied."""
    tooltip = (
        "How nvfp4 and mxfp4 weights are multiplied. auto: what is the fastest where that was "
        "measured. w4a16: in 16 bits, exactly. w4a8: in FP8, or INT8 on older GPUs. native: in 4 "
        "bits, on GPUs that can. w4a8_exact: in FP8 or INT8, whichever errs less for the layer, "
        "which is slower than w4a8. w4a8_fp8, w4a8_int8: in these. Other formats have one way: "
        "leave auto."
    )
    return (list(ARITHMETICS), {"default": AUTO, "tooltip": tooltip, "advanced": True})


def recipe_input() -> tuple:
    """Return the `recipe` input."""
    tooltip = (
        "Which layers are quantized. auto: the rules of the model's own family, which spare "
        "embeddings, modulation, norms and the head. none: every linear layer."
    )
    return (list(recipe.names()), {"default": recipe.AUTO, "tooltip": tooltip, "advanced": True})


def keep_input() -> tuple:
    """Return the `keep` input."""
    tooltip = (
        "Layers to leave in their own precision: regular expressions searched in the layer's name, "
        "one a line, for example blocks\\.0\\. for the first block. Empty: none."
    )
    return ("STRING", {"default": "", "multiline": True, "tooltip": tooltip, "advanced": True})


def part_of_sampling(default: float, tooltip: str) -> tuple:
    """Return an input that is a part of the sampling, 0 to 1."""
    settings = {"default": default, "min": 0.0, "max": 1.0, "step": 0.01, "advanced": True}
    return ("FLOAT", {**settings, "tooltip": tooltip})


def keep_patterns(text: str) -> list[str]:
    """Return the expressions of a `keep` input: its lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]
