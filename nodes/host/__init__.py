"""The boundary to ComfyUI, the host: only this folder imports it.

It does so when a function is called, not before: without ComfyUI the nodes can still be listed and
tested. One idea per file:

- `loading`: a checkpoint as a model, quantized while it is read
- `quantizing`: a model of any loader, quantized on a clone
- `layers`: a model's linear layers and their records
- `linear`: our weights in the host's Linear
- `fusing`: what our layers share, and which layers of the host leave steps to ours
- `norms`: weights of the host's norms
- `clones`: the class of our modules, and what becomes of them when the host clones a model
- `attention`: a model's attention by an override of ours
- `lora`: LoRAs beside the weights
- `saving`: a model as a file
- `folders`: files under `models/`, and where compiled kernels are kept
- `memory`: room on the device
- `work`: the device, the progress bar and the user's wish to stop
"""

from .attention import set_attention
from .folders import keep_machine_code, lora_names, lora_path, model_names, model_path
from .layers import layer_records
from .loading import load_model
from .lora import merged, set_lora
from .quantizing import quantize_model
from .saving import save_model
from .work import progress

__all__ = [
    "keep_machine_code",
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
