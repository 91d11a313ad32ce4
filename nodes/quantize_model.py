"""The node that quantizes a model from any loader."""

from . import host
from .inputs import (
    AUTO,
    CATEGORY,
    arithmetic_input,
    format_input,
    keep_input,
    keep_patterns,
    recipe_input,
)


class LowBitQuantizeModel:
    """Quantize the linear layers of a MODEL; the model that comes in stays as it is."""

    DISPLAY_NAME = "Quantize Model (LowBit)"
    DESCRIPTION = (
        "Quantizes the linear layers of a model from any loader. The model that comes in stays as "
        "it is; LoRAs work before and after. With as_stored, layers that are quantized already "
        "keep their bits and run through this pack's arithmetic."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, with quantized weights.",)
    FUNCTION = "quantize"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model to quantize; it is not changed."}),
                "format": format_input("int8_convrot"),
                "recipe": recipe_input(),
                "keep": keep_input(),
            },
            "optional": {"arithmetic": arithmetic_input()},
        }

    def quantize(self, model, format, recipe, keep, arithmetic=AUTO):
        keep = keep_patterns(keep)
        return (host.quantize_model(model, format, recipe, keep, arithmetic),)


NODE = LowBitQuantizeModel
