"""The node that saves a quantized model."""

from . import host
from .inputs import CATEGORY


class LowBitSaveModel:
    """Save a MODEL as a safetensors file that ComfyUI loads."""

    DISPLAY_NAME = "Save Model (LowBit)"
    DESCRIPTION = (
        "Saves the diffusion model, with its formats and with LoRAs merged in, as one safetensors "
        "file under the output folder. Under diffusion_models/ there, loaders list it. ComfyUI "
        "loads it without this pack, except fp8_e4m3_rowwise."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("path",)
    OUTPUT_TOOLTIPS = ("Where the file is.",)
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls):
        model = {"tooltip": "The model to save; patches such as LoRAs are merged into the file."}
        prefix = {
            "default": "diffusion_models/lowbit",
            "tooltip": "Folder and beginning of the name, under ComfyUI's output folder.",
        }
        return {
            "required": {"model": ("MODEL", model), "filename_prefix": ("STRING", prefix)},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save(self, model, filename_prefix, prompt=None, extra_pnginfo=None):
        path = host.save_model(host.merged(model), filename_prefix, prompt, extra_pnginfo)
        return {"ui": {"text": [path]}, "result": (path,)}


NODE = LowBitSaveModel
