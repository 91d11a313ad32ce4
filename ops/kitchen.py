"""comfy-kitchen's registry of kernels, as far as this pack directs it."""

import contextlib

import torch
from comfy_kitchen.registry import registry


def on_gpu_of(x: torch.Tensor):
    """Return a context in which the GPU that x lies on is the current one, as packages want it.

    comfy-kitchen and SageAttention launch on the current GPU, refuse tensors of another, or leave
    another one current. Compiled graphs see to it themselves, and tensors that only stand for some
    lie on no GPU.
    """
    # Not `is_compiling`, which also holds for what runs while another thread's graph is compiled.
    if torch.compiler.is_dynamo_compiling() or not torch.cuda.is_initialized():
        return contextlib.nullcontext()
    return torch.cuda.device_of(x)


def kitchen_eager():
    """Return a context in which comfy-kitchen computes in plain torch.

    Its CUDA kernels for block-scaled formats take only 16-bit input; weights are quantized in
    float32, to the same bytes on every device.
    """
    return registry.use_backend("eager")
