"""The product of 8-bit activations and 4-bit weights (W4A8), decoded while they are multiplied."""

import torch

from .. import registry
from ..custom_op import custom_op
from ..decode_fp4 import NVFP4_GROUP, check, check_devices
from ..quantize_rows.order import BLOCK
from ..scaled_mm.check import OUTPUTS
from .tiles import MOST_TOKENS

OP = "fp4_scaled_mm"
SCHEMES = ("nvfp4", "mxfp4")
E4M3 = torch.float8_e4m3fn


def fp4_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    shape: tuple[int, int],
    group: int,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """Return x_scale · w_scale · (x · Wᵀ) + bias, [M, N] of out_dtype.

    x: [M, K] E4M3, contiguous, columns in the order of `interleave`, K % 128 = 0. x_scale: float32,
    [M, 1] or one element. packed, scale, tensor_scale, shape, group: of W [N, K], as
    `decode_fp4_e4m3` has them, without padding along K; W and w_scale [N] are what that makes of
    them, to the bit. bias: [N] bfloat16, float16 or float32, as is out_dtype. Sums are FP8's of the
    tensor cores, as in `scaled_mm`; what follows them is float32, rounded once at the end.
    Raises TypeError or ValueError when arguments do not fit, NoBackendError when no backend can run
    them.
    """
    n, k = shape
    if x.dtype != E4M3 or x.dim() != 2 or x.shape[1] != k or not x.is_contiguous() or k % BLOCK:
        raise ValueError(
            f"fp4_scaled_mm: x is {x.dtype} {list(x.shape)}; contiguous {E4M3} [M, {k}], "
            f"interleaved, so of a multiple of {BLOCK} columns, is wanted"
        )
    if x_scale.dtype != torch.float32 or x_scale.numel() not in (1, x.shape[0]):
        raise ValueError(
            f"fp4_scaled_mm: x_scale is {x_scale.dtype} {list(x_scale.shape)}; float32 "
            f"[{x.shape[0]}, 1] or one element is wanted"
        )
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype not in OUTPUTS):
        raise ValueError(
            f"fp4_scaled_mm: bias is {bias.dtype} {list(bias.shape)}; [{n}] of bfloat16, float16 "
            "or float32 is wanted"
        )
    if out_dtype not in OUTPUTS:
        raise TypeError(f"fp4_scaled_mm: out_dtype is {out_dtype}; bfloat16, float16 and float32")
    check(packed, scale, tensor_scale, shape, group)
    check_devices(OP, packed.device, x=x, x_scale=x_scale, bias=bias)
    if 2 * packed.shape[1] != k:
        raise ValueError(f"fp4_scaled_mm: packed has {2 * packed.shape[1]} columns, x has {k}")
    scale = scale.view(torch.uint8)
    weight = (packed, scale, tensor_scale, bias, *shape, group)
    return _OP(x, x_scale.contiguous(), *weight, out_dtype, backend)


def prefers_interleaved(scheme: str, device: torch.device, n: int, k: int, tokens: int) -> bool:
    """Return whether so few tokens are faster multiplied here than by a decoded weight.

    So it is where a backend that was measured can run; then activations are to be interleaved.
    """
    if tokens > MOST_TOKENS:
        return False
    call = registry.Call(scheme, device, n, k)
    measured = (b.needs for b in registry.backends(OP) if b.needs.measured)
    return any(registry.unmet(needs, call) is None for needs in measured)


def scheme(group: int) -> str:
    """Return the name under which backends register a kind of 4-bit weight."""
    return SCHEMES[0] if group == NVFP4_GROUP else SCHEMES[1]


def _run(x, x_scale, packed, scale, tensor_scale, bias, n, k, group, out_dtype, backend):
    run = registry.select(OP, registry.Call(scheme(group), x.device, n, k), backend).run
    if x.shape[0] == 0 or n == 0:
        return x.new_empty(x.shape[0], n, dtype=out_dtype)
    return run(x, x_scale, packed, scale, tensor_scale, bias, n, group, out_dtype)


_OP = custom_op(
    "fp4_scaled_mm(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? tensor_scale, "
    "Tensor? bias, SymInt n, SymInt k, int group, ScalarType out_dtype, str backend) -> Tensor",
    _run,
    lambda x, x_scale, packed, scale, tensor_scale, bias, n, k, group, out_dtype, *rest: (
        x.new_empty(x.shape[0], n, dtype=out_dtype)
    ),
)
registry.discover(__name__)
