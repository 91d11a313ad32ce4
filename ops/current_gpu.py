"""Which GPU is the current one for packages that launch on it."""

import contextlib

import torch


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
