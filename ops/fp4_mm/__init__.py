"""The product of 16-bit activations and 4-bit weights (W4A16): exact weights, one rounding."""

import torch

from .. import registry
from ..custom_op import custom_op
from ..decode_fp4 import FLOATS, NVFP4_GROUP, check, check_devices

OP = "fp4_mm"
SCHEMES = tuple(f"{name}_{bits}" for name in ("nvfp4", "mxfp4") for bits in (16, 32))


def fp4_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    shape: tuple[int, int],
    group: int,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return tensor_scale · (x · Wᵀ) + bias, [M, N], in the dtype of x.

    x: [M, K] bf16, fp16 or fp32, any strides, never written to. packed, scale, shape, group: of W
    [N, K], as `decode_fp4` has them. tensor_scale: one float32 element, or None. bias: [N] float.
    W is multiplied as it is, E2M1 times the scale of its block, which 16 bits hold; sums are
    float32, and so is what follows them, rounded once at the end.
    Raises TypeError or ValueError when arguments do not fit, NoBackendError when no backend can run
    them.
    """
    if x.dtype not in FLOATS or x.dim() != 2 or x.shape[1] != shape[1]:
        raise ValueError(
            f"fp4_mm: x is {x.dtype} {list(x.shape)}; [M, {shape[1]}] of "
            f"{', '.join(map(str, FLOATS))} is wanted"
        )
    if bias is not None and tuple(bias.shape) != (shape[0],):
        raise ValueError(f"fp4_mm: bias is {list(bias.shape)}; [{shape[0]}] is wanted")
    check(packed, scale, tensor_scale, shape, group)
    check_devices(OP, packed.device, x=x, bias=bias)
    scale = scale.view(torch.uint8)
    return _OP(x, packed, scale, tensor_scale, bias, *shape, group, backend)


def scheme_of(group: int, dtype: torch.dtype) -> str:
    """Return the name of products of a kind of weight and of activations of a dtype."""
    return f"{'nvfp4' if group == NVFP4_GROUP else 'mxfp4'}_{8 * dtype.itemsize}"


def _run(x, packed, scale, tensor_scale, bias, n, k, group, backend):
    call = registry.Call(scheme_of(group, x.dtype), x.device, n, k)
    run = registry.select(OP, call, backend).run
    if x.numel() == 0 or n == 0:
        return x.new_empty(x.shape[0], n)
    return run(x, packed, scale, tensor_scale, bias, n, group)


_OP = custom_op(
    "fp4_mm(Tensor x, Tensor packed, Tensor scale, Tensor? tensor_scale, Tensor? bias, SymInt n, "
    "SymInt k, int group, str backend) -> Tensor",
    _run,
    lambda x, packed, scale, tensor_scale, bias, n, *rest: x.new_empty(x.shape[0], n),
)
registry.discover(__name__)
