"""Nodes that only the host tests use. ComfyUI loads this folder as a custom node pack.

Every node takes a `nonce`: a new value makes the server run the node again instead of taking its
cached output; it changes nothing else.
"""

import hashlib
import types

import comfy.model_management
import torch

CLIP_WIDTH = 1280
NONCE = ("INT", {"default": 0, "min": 0, "max": 2**31})


class LowBitTestConditioning:
    """Random text embeddings, so that tests need no text encoder.

    image_tokens: of an image as CLIP sees it, beside the text. hidden: the last tokens of the text
    that a mask hides.
    """

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "lowbit/test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802  the host's name
        size = {"min": 1, "max": 65536}
        return {
            "required": {
                "length": ("INT", {"default": 16, **size}),
                "width": ("INT", {"default": 4096, **size}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31}),
                "nonce": NONCE,
            },
            "optional": {
                "image_tokens": ("INT", {"default": 0, "min": 0, "max": 65536}),
                "hidden": ("INT", {"default": 0, "min": 0, "max": 65536}),
            },
        }

    def make(self, length, width, seed, nonce, image_tokens=0, hidden=0):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, length, width, generator=generator)
        options = {}
        if image_tokens:
            image = torch.randn(1, image_tokens, CLIP_WIDTH, generator=generator)
            seen = types.SimpleNamespace(penultimate_hidden_states=image)
            options["clip_vision_output"] = seen
        if hidden:
            options["attention_mask"] = (torch.arange(length) < length - hidden)[None].long()
        return ([[text, options]],)


class LowBitTestUnload:
    """Pass a latent on after moving every model out of the device's memory."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "unload"
    CATEGORY = "lowbit/test"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802  the host's name
        return {"required": {"samples": ("LATENT",), "nonce": NONCE}}

    def unload(self, samples, nonce):
        comfy.model_management.unload_all_models()
        return (samples,)


class LowBitTestWeightHash:
    """Show a hash of each weight's stored bytes, patches undone. One line: name, hash.

    `after` only orders the node: it runs once that latent exists.
    """

    RETURN_TYPES = ("STRING",)
    FUNCTION = "show"
    CATEGORY = "lowbit/test"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802  the host's name
        return {
            "required": {"model": ("MODEL",), "nonce": NONCE},
            "optional": {"after": ("LATENT",)},
        }

    def show(self, model, nonce, after=None):
        comfy.model_management.unload_all_models()
        lines = [
            f"{name} {_hash(value)}" for name, value in sorted(model.model.state_dict().items())
        ]
        text = "\n".join(lines)
        return {"ui": {"text": [text]}, "result": (text,)}


def _hash(value):
    if not isinstance(value, torch.Tensor):
        return repr(value)
    value = value.detach().cpu().contiguous()
    data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls for cls in (LowBitTestConditioning, LowBitTestUnload, LowBitTestWeightHash)
}
