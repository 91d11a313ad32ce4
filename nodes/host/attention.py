"""Attention in the host: an override in a model's options, and layers that leave it more to do."""

from ...ops.attention import router
from .. import fused
from ..attention_override import OVERRIDE, Override
from . import fusing


def set_attention(patcher, override: Override):
    """Return a clone of `patcher` that computes attention by `override`.

    Raises NoBackendError when its mode can run nothing on the GPU, or CPU, of the model.
    """
    from comfy.patcher_extension import WrappersMP

    router.check_runs(override.mode, patcher.load_device)
    clone = patcher.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    override.previous = options.get(OVERRIDE)
    options[OVERRIDE] = override
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "lowbit_attention", override.forward)
    fusing.replace(patcher, clone, fused.ATTENTION)
    return clone
