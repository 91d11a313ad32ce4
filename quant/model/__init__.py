"""Quantizing the `nn.Linear` layers of any model, diffusers' Wan and Qwen-Image among them.

Nothing here needs diffusers until its attention is set or a file is to be made into a model of its
own.
"""

from .attention import AttentionSetting, set_attention
from .file import load_model, save_model
from .quantize import Quantization, layer_records, quantize_model

__all__ = [
    "AttentionSetting",
    "Quantization",
    "layer_records",
    "load_model",
    "quantize_model",
    "save_model",
    "set_attention",
]
