"""Norms of the host, for those who compute them elsewhere."""

import torch


def norm_weight(norm: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
    """Return the weight of one of the host's norms as its forward has it, to be kept.

    A copy where the host lends it: the next layer's may come to the same memory.
    """
    import comfy.ops

    functions = getattr(norm, "weight_function", ()) or getattr(norm, "bias_function", ())
    if not (getattr(norm, "comfy_cast_weights", False) or functions):
        return norm.weight
    with comfy.ops.CastBiasWeightContext(norm, like, offloadable=True) as (weight, _):
        if torch.compiler.is_compiling():
            return weight.clone()
        own = weight.device == norm.weight.device and weight.data_ptr() == norm.weight.data_ptr()
        return weight if own else weight.clone()
