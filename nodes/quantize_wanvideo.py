"""The node that quantizes a model of WanVideoWrapper."""

from . import wanvideo_weights
from .inputs import (
    AUTO,
    CATEGORY,
    arithmetic_input,
    format_input,
    keep_input,
    keep_patterns,
    recipe_input,
)


class LowBitQuantizeWanVideo:
    """Quantize the linear layers of a WANVIDEOMODEL; the model that comes in stays as it is."""

    DISPLAY_NAME = "Quantize WanVideo (LowBit)"
    DESCRIPTION = (
        "Quantizes the linear layers of a model from WanVideoWrapper's loader. Its block swap, "
        "samplers and LoRAs, merged or not, work as before. With as_stored, the layers of a scaled "
        "FP8 file keep their bits, and their scales in float32."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, with quantized weights.",)
    FUNCTION = "quantize"

    @classmethod
    def INPUT_TYPES(cls):
        tooltip = "The model to quantize, of WanVideo Model Loader; it is not changed."
        return {
            "required": {
                "model": ("WANVIDEOMODEL", {"tooltip": tooltip}),
                "format": format_input("int8_convrot"),
                "recipe": recipe_input(),
                "keep": keep_input(),
            },
            "optional": {"arithmetic": arithmetic_input()},
        }

    def quantize(self, model, format, recipe, keep, arithmetic=AUTO):
        keep = keep_patterns(keep)
        return (wanvideo_weights.quantize(model, format, recipe, keep, arithmetic),)


NODE = LowBitQuantizeWanVideo
