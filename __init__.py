"""LowBit for ComfyUI: WanVideo and Qwen-Image diffusion transformers in 8 and 4 bits."""

WEB_DIRECTORY = "./web"

# For models in Python, diffusers' among them.
MODEL = ("layer_records", "load_model", "quantize_model", "save_model", "set_attention")

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", *MODEL]


def __getattr__(name: str):
    """Return what is asked for when it is asked for: `lowbit --help` is not to import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in MODEL:
        from .quant import model

        return getattr(model, name)
    from . import nodes

    return getattr(nodes, name)
