"""comfy-kitchen's registry of kernels, as far as this pack directs it."""

from comfy_kitchen.registry import registry


def kitchen_eager():
    """Return a context in which comfy-kitchen computes in plain torch.

    Its CUDA kernels for block-scaled formats take only 16-bit input; weights are quantized in
    float32, to the same bytes on every device.
    """
    return registry.use_backend("eager")
