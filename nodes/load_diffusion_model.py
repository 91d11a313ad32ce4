"""The node that loads a diffusion model and quantizes it on the way."""

import logging

from ..quant.best import best_format
from ..quant.checkpoint import open_checkpoint
from . import host
from .inputs import (
    AS_STORED,
    AUTO,
    CATEGORY,
    arithmetic_input,
    format_input,
    keep_input,
    keep_patterns,
    recipe_input,
)

logger = logging.getLogger(__name__)


class LowBitLoadDiffusionModel:
    """Load a file from models/diffusion_models, quantized while it is read."""

    DISPLAY_NAME = "Load Diffusion Model (LowBit)"
    DESCRIPTION = (
        "Loads a WanVideo, Qwen-Image or other diffusion model and quantizes it while reading: the "
        "16-bit model is never in memory as a whole. Files that are quantized already, FP8 without "
        "scales too, load as they are, unless a format is chosen."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, with quantized weights.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "A file of models/diffusion_models: 16 or 32 bits, quantized already, or GGUF."
        return {
            "required": {
                "model_name": (host.model_names(), {"tooltip": tooltip}),
                "format": format_input(AUTO),
                "recipe": recipe_input(),
                "keep": keep_input(),
            },
            "optional": {"arithmetic": arithmetic_input()},
        }

    def load(self, model_name, format, recipe, keep, arithmetic=AUTO):
        path = host.model_path(model_name)
        keep = tuple(keep_patterns(keep))
        if format == AUTO:
            format = best_format(open_checkpoint(path)) or AS_STORED
            if format == AS_STORED and (keep or recipe != AUTO):
                logger.warning(
                    "LowBit: %s is quantized already and loads as stored: recipe and keep are not "
                    "used; they are with a format chosen",
                    model_name,
                )
        return (host.load_model(path, format, recipe, keep, arithmetic),)


NODE = LowBitLoadDiffusionModel
