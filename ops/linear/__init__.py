"""Linear layers with a quantized weight: y = x · Wᵀ + bias.

The weight is a comfy-kitchen `QuantizedTensor` whose layout class states its `scheme` (the
arithmetic that it stands for, say `fp8_tensor`) and `kitchen_layout` (the layout of comfy-kitchen
that it extends). Every backend gives the same result up to the rounding of the activation.
"""

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .. import registry, tuning

OP = "linear"


def linear(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return x · Wᵀ + bias, [..., N], in the dtype of `x`.

    x: [..., K] float, any strides, never written to. weight: [N, K] quantized. bias: [N] or None.
    backend: `auto`, or the name of one that then runs or raises.
    Raises ValueError when the shapes do not fit, NoBackendError when no backend can run the call.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"linear: input has {x.shape[-1]} features, weight [{n}, {k}] takes {k}")
    if isinstance(x, QuantizedTensor):
        x = x.dequantize()
    flat, scheme = x.reshape(-1, k), weight.layout_cls.scheme
    m = tuning.bucket_if_tuned(OP, scheme, x.device, n, k, flat.shape[0])
    run = registry.select(OP, registry.Call(scheme, x.device, n, k, m), backend).run
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], n))
    return run(flat, weight, bias).to(x.dtype).reshape(*x.shape[:-1], n)


registry.discover(__name__)
