"""The node that chooses how a model of WanVideoWrapper computes attention."""

from . import wanvideo_routing
from .attention import HADAMARD, NO_ROTATION, LowBitAttention
from .attention_override import Override
from .inputs import CATEGORY


class LowBitWanVideoAttention:
    """Compute the attention of a WANVIDEOMODEL in 8 bits; what comes in stays as it is."""

    DISPLAY_NAME = "WanVideo Attention (LowBit)"
    DESCRIPTION = (
        "Computes attention of a model from WanVideoWrapper's loader in 8 bits where that was "
        "measured to be faster, or in the mode that is chosen. The model that comes in stays as it "
        "is; all else is computed in the mode chosen in the loader."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("WANVIDEOMODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, with this attention.",)
    FUNCTION = "set_attention"

    @classmethod
    def INPUT_TYPES(cls):
        shared = LowBitAttention.INPUT_TYPES()
        inputs = dict(shared["required"])
        tooltip = "The model, of WanVideo Model Loader; it is not changed."
        inputs["model"] = ("WANVIDEOMODEL", {"tooltip": tooltip})
        modes, settings = inputs["mode"]
        tooltip = settings["tooltip"].replace("else ComfyUI's own", "else the loader's mode")
        inputs["mode"] = (modes, {**settings, "tooltip": tooltip})
        return {**shared, "required": inputs}

    # ComfyUI asks for one where older wrappers' names of modes are to pass.
    VALIDATE_INPUTS = LowBitAttention.VALIDATE_INPUTS

    def set_attention(
        self, model, mode, layers, blocks, start_percent, end_percent, guard, rotation=NO_ROTATION
    ):
        steps = (start_percent, end_percent)
        rules = Override(mode, layers, blocks, steps, guard, rotation == HADAMARD)
        return (wanvideo_routing.set_attention(model, rules),)


NODE = LowBitWanVideoAttention
