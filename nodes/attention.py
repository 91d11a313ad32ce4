"""The node that chooses how a model computes attention."""

from . import host
from .attention_override import LAYERS, Override
from .inputs import CATEGORY, part_of_sampling

MODES = ("auto", "lowbit_exact", "lowbit_int8", "lowbit_fp8", "sdpa", "kitchen_int8", "sageattn")


class LowBitAttention:
    """Compute the attention of a MODEL in 8 bits; the model that comes in stays as it is."""

    DISPLAY_NAME = "Attention (LowBit)"
    DESCRIPTION = (
        "Computes attention in 8 bits where that was measured to be faster, or in the mode that is "
        "chosen. The model that comes in stays as it is; other branches run as before."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, with this attention.",)
    FUNCTION = "set_attention"

    @classmethod
    def INPUT_TYPES(cls):
        mode = (
            "auto: what was measured to be the fastest for this GPU and size, else ComfyUI's own. "
            "lowbit_*: 8 bits, P·V in 16 bits (exact), INT8 or FP8. sdpa: torch's own. "
            "kitchen_int8, sageattn: of those packages."
        )
        layers = (
            "self: a video or image attends to itself. cross: it attends to the text. all: both."
        )
        blocks = "Blocks and ranges of blocks, counted from 0: 0-2, 5, 38-. Empty: all."
        start = "Part of the sampling at which it begins, 0 to 1; before, attention is as it was."
        end = "Part of the sampling at which it ends, 0 to 1; after, attention is as it was."
        guard = (
            "Check every result for NaN and infinity, and compute such a call again with torch's "
            "attention. Costs a little time. Off: no check."
        )
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model; it is not changed."}),
                "mode": (list(MODES), {"default": "auto", "tooltip": mode}),
                "layers": (list(LAYERS), {"default": "self", "tooltip": layers, "advanced": True}),
                "blocks": ("STRING", {"default": "", "tooltip": blocks, "advanced": True}),
                "start_percent": part_of_sampling(0.0, start),
                "end_percent": part_of_sampling(1.0, end),
                "guard": ("BOOLEAN", {"default": False, "tooltip": guard, "advanced": True}),
            }
        }

    def set_attention(self, model, mode, layers, blocks, start_percent, end_percent, guard):
        override = Override(mode, layers, blocks, (start_percent, end_percent), guard)
        return (host.set_attention(model, override),)


NODE = LowBitAttention
