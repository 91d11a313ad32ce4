"""Attention in the host: an override in a model's transformer options."""

from ...ops.attention import router
from ...ops.registry import NoBackendError
from ..attention_override import Override

# The key of transformer options under which the host looks for an override.
ATTENTION = "optimized_attention_override"


def set_attention(patcher, override: Override):
    """Return a clone of `patcher` that computes attention by `override`.

    Raises NoBackendError when its mode can run nothing on the GPU, or CPU, of the model.
    """
    from comfy.patcher_extension import WrappersMP

    if reason := router.missing(override.mode, patcher.load_device):
        raise NoBackendError(reason)
    clone = patcher.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    override.previous = options.get(ATTENTION)
    options[ATTENTION] = override
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "lowbit_attention", override.forward)
    return clone
