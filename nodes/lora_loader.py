"""The node that puts a LoRA beside a model's weights."""

from . import host
from .inputs import CATEGORY, part_of_sampling


class LowBitLoraLoader:
    """Compute a LoRA beside the weights of a MODEL; the model that comes in stays as it is."""

    DISPLAY_NAME = "Load LoRA (LowBit)"
    DESCRIPTION = (
        "Computes a LoRA beside the weights instead of merging it into them: quantized weights "
        "stay as they are, loading takes no time, and the strength can depend on the step. Any "
        "number may follow each other, ComfyUI's own LoRA loader among them."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model, with the LoRA beside its weights.",)
    FUNCTION = "load_lora"

    @classmethod
    def INPUT_TYPES(cls):
        name = "A safetensors file of models/loras, of kohya, diffusers, PEFT, LightX2V or ComfyUI."
        strength = {
            "default": 1.0,
            "min": -20.0,
            "max": 20.0,
            "step": 0.01,
            "tooltip": "How strongly the LoRA acts: 1 as trained, 0 not at all, below 0 reversed.",
        }
        start = "Part of the sampling at which it begins, 0 to 1; before, the LoRA does not act."
        end = "Part of the sampling at which it ends, 0 to 1; after, the LoRA does not act."
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model, quantized or not; it is not changed."}),
                "lora_name": (host.lora_names(), {"tooltip": name}),
                "strength": ("FLOAT", strength),
                "start_percent": part_of_sampling(0.0, start),
                "end_percent": part_of_sampling(1.0, end),
            }
        }

    def load_lora(self, model, lora_name, strength, start_percent, end_percent):
        path = host.lora_path(lora_name)
        return (host.set_lora(model, path, strength, (start_percent, end_percent)),)


NODE = LowBitLoraLoader
