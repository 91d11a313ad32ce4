"""Our modules in the host: their class, and what becomes of them when the host clones a model.

For torch.compile, which dynamic memory management rules out, and for a second GPU the host loads
the file again and hands the new patcher the old one's object patches. Our modules there would
have the first model's children and belong to its memory management.
"""

from collections.abc import Callable
from functools import cache, partial
from operator import attrgetter

import torch

from ...ops.linear.modules import is_quantized
from ...quant import fusion

Again = Callable[[torch.nn.Module], torch.nn.Module]
CALLBACK = "lowbit_clones"


@cache
def operations(dtype: torch.dtype):
    """Return the host's operations for quantized weights that are computed with in `dtype`.

    The same each time: torch.compile would compile anew for every new class.
    """
    import comfy.ops

    return comfy.ops.mixed_precision_ops(compute_dtype=dtype)


def watch(patcher, again: Again) -> None:
    """Have the host call `renew` for each clone of `patcher`, and of its clones."""
    from comfy.patcher_extension import CallbacksMP

    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLONE, CALLBACK)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, CALLBACK, partial(renew, again))


def renew(again: Again, patcher, clone) -> None:
    """Give `clone` modules for itself in place of ours, where its model is not `patcher`'s.

    again: returns another Linear with the weight and bias of one of ours.
    """
    if clone.model is patcher.model:
        return
    _to_computed_dtype(clone.model.diffusion_model)
    for key, module in clone.object_patches.items():
        if isinstance(module, fusion.Fused):
            clone.object_patches[key] = fusion.moved(module, attrgetter(key)(clone.model))
        elif is_quantized(getattr(module, "weight", None)):
            made = again(module)
            fusion.share_as(module, made)
            clone.object_patches[key] = made


def _to_computed_dtype(root: torch.nn.Module) -> None:
    """Bring the weights of a model that the host has loaded again to the dtype it computes in.

    Where dynamic memory management is on, ComfyUI 0.33 loads layers as they are in the file, also
    for a clone without it, of whose layers those of its plain class cast nothing.
    """
    for module in root.modules():
        if getattr(module, "comfy_cast_weights", True):
            continue
        for name, value in list(module.named_parameters(recurse=False)):
            dtype = getattr(module, f"{name}_comfy_model_dtype", None)
            if dtype is not None and type(value.data) is torch.Tensor and value.dtype != dtype:
                value.data = value.data.to(dtype)
