"""The boundary to ComfyUI, the host: only this folder imports it.

It does so when a function is called, not before: without ComfyUI the nodes can still be listed and
tested. One idea per file:

- `loading`: models loaded and quantized, and their layers' records
- `clones`: the class of our modules, and what becomes of them when the host clones a model
- `lora`: LoRAs beside the weights
- `saving`: a model as a file
- `folders`: files under `models/`
- `memory`: room on the device
"""

from .folders import lora_names, lora_path, model_names, model_path
from .loading import layer_records, load_model, progress, quantize_model, set_attention
from .lora import merged, set_lora
from .saving import save_model

__all__ = [
    "layer_records",
    "load_model",
    "lora_names",
    "lora_path",
    "merged",
    "model_names",
    "model_path",
    "progress",
    "quantize_model",
    "save_model",
    "set_attention",
    "set_lora",
]
