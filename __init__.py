"""LowBit for ComfyUI: WanVideo and Qwen-Image diffusion transformers in 8 and 4 bits."""

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]


def __getattr__(name: str):
    """Return the mappings of nodes when ComfyUI asks: `lowbit --help` is not to import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import nodes

    return getattr(nodes, name)
