"""The product of MXFP4 activations and MXFP4 weights (W4A4): EXPERIMENTAL on tensor cores.

Its kernel has not run on a GPU that has the instructions. `reference` gives the same numerics on
any device.
"""

import torch

from .. import registry
from ..custom_op import custom_op
from ..decode_fp4 import FLOATS, MXFP4_GROUP, check, check_devices

OP = "mxfp4_mm"
SCHEME = "mxfp4"


def mxfp4_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return x' · Wᵀ + bias, [M, N], in the dtype of x, where x' is x rounded to MXFP4.

    x: [M, K] bf16, fp16 or fp32, any strides, never written to; rounded as `block_scales.mxfp4`
    does, every block of 32 by the scale that errs less. packed, scale, shape: of W [N, K], as
    `decode_fp4` has them for group 32. bias: [N] float. Sums are float32, rounded once at the end.
    A block of x that holds NaN or Inf makes its row NaN. backend: `auto` is the reference; the
    kernel runs when named.
    Raises TypeError or ValueError when arguments do not fit, NoBackendError when the backend cannot
    run them.
    """
    if x.dtype not in FLOATS or x.dim() != 2 or x.shape[1] != shape[1]:
        raise ValueError(
            f"{OP}: x is {x.dtype} {list(x.shape)}; [M, {shape[1]}] of "
            f"{', '.join(map(str, FLOATS))} is wanted"
        )
    if bias is not None and tuple(bias.shape) != (shape[0],):
        raise ValueError(f"{OP}: bias is {list(bias.shape)}; [{shape[0]}] is wanted")
    check(packed, scale, None, shape, MXFP4_GROUP)
    check_devices(OP, packed.device, x=x, bias=bias)
    return _OP(x, packed, scale.view(torch.uint8), bias, *shape, backend)


def _run(x, packed, scale, bias, n, k, backend):
    run = registry.select(OP, registry.Call(SCHEME, x.device, n, k), backend).run
    if x.numel() == 0 or n == 0:
        return x.new_empty(x.shape[0], n)
    return run(x, packed, scale, bias, n)


_OP = custom_op(
    "mxfp4_mm(Tensor x, Tensor packed, Tensor scale, Tensor? bias, SymInt n, SymInt k, "
    "str backend) -> Tensor",
    _run,
    lambda x, packed, scale, bias, n, *rest: x.new_empty(x.shape[0], n),
)
registry.discover(__name__)
