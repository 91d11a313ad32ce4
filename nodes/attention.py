"""The node that chooses how a model computes attention."""

from ..ops.attention import router
from ..ops.attention.guard import FIRST_CALL, GUARDS
from ..ops.registry import NoBackendError
from . import host
from .attention_override import ALL, LAYERS, Override, forget_graphs
from .inputs import CATEGORY, part_of_sampling

MODES = (
    *("auto", "lowbit_exact", "lowbit_int8", "lowbit_fp8", "sdpa", "cudnn", "flash"),
    *("kitchen_int8", "sageattn", "sageattn3_fp4", "lowbit_fp4"),
)
NO_ROTATION, HADAMARD = ROTATIONS = ("none", "hadamard")


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
            "lowbit_*: 8 bits, P·V in 16 bits (exact), INT8 or FP8. sdpa, cudnn, flash: torch's, "
            "in 16 bits. kitchen_int8, sageattn, sageattn3_fp4: of those packages. lowbit_fp4: "
            "experimental, in FP4, for GPUs that have it."
        )
        layers = (
            "self: a video or image attends to itself. cross: to the text. image_cross: to the "
            "image of Wan's image-to-video, in 16 bits only. all: every one."
        )
        blocks = "Blocks and ranges of blocks, counted from 0: 0-2, 5, 38-. Empty: all."
        start = "Part of the sampling at which it begins, 0 to 1; before, attention is as it was."
        end = "Part of the sampling at which it ends, 0 to 1; after, attention is as it was."
        guard = (
            "first_call: compare the first result of each size with torch's attention, and use "
            "torch's where it is wrong. every_call: also check every result for NaN and infinity, "
            "which costs a little time. off: neither."
        )
        rotation = (
            "hadamard: lowbit_* modes multiply Q and K by a Hadamard matrix before rounding them, "
            "which Q·K does not see: more exact where a few channels are much larger than the "
            "others, and a little slower. none: as they are."
        )
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model; it is not changed."}),
                "mode": (list(MODES), {"default": "auto", "tooltip": mode}),
                "layers": (list(LAYERS), {"default": ALL, "tooltip": layers, "advanced": True}),
                "blocks": ("STRING", {"default": "", "tooltip": blocks, "advanced": True}),
                "start_percent": part_of_sampling(0.0, start),
                "end_percent": part_of_sampling(1.0, end),
                "guard": (
                    list(GUARDS),
                    {"default": FIRST_CALL, "tooltip": guard, "advanced": True},
                ),
            },
            # Workflows from before it was there have none.
            "optional": {
                "rotation": (
                    list(ROTATIONS),
                    {"default": NO_ROTATION, "tooltip": rotation, "advanced": True},
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, mode):
        """Return True for a mode, names of older wrappers included, else what is wrong with it.

        mode: None where another node gives it.
        """
        try:
            router.known(mode or "auto")
        except (ValueError, NoBackendError) as error:
            return str(error)
        return True

    def set_attention(
        self, model, mode, layers, blocks, start_percent, end_percent, guard, rotation=NO_ROTATION
    ):
        steps = (start_percent, end_percent)
        override = Override(mode, layers, blocks, steps, guard, rotation == HADAMARD)
        forget_graphs()
        return (host.set_attention(model, override),)


NODE = LowBitAttention
