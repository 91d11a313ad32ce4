"""torch's own scaled matrix product, for FP8 weights with one scale per output channel.

Rowwise scales want A row-major [M, K] with scale [M, 1], B column-major [K, N] with scale [1, N].
"""

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..quantize_rows import quantize_rows
from ..registry import Backend, Needs, register

FP8 = torch.float8_e4m3fn
SELF_TEST_MAX_ERROR = 0.08


def run(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x · Wᵀ + bias, x quantized per token; x [M, K], weight [N, K], bias [N] or None."""
    stored, scale = quantize_rows(x, FP8)
    out_dtype = x.dtype if x.dtype == torch.float16 else torch.bfloat16
    out = torch._scaled_mm(
        stored,
        weight._qdata.t(),
        scale_a=scale,
        scale_b=weight._params.scale.reshape(1, -1),
        out_dtype=out_dtype,
    )
    return out if bias is None else out + bias.to(out.dtype)


def self_test(device: torch.device) -> str | None:
    """Return why rowwise `_scaled_mm` cannot be trusted on `device`, or None when it can."""
    a = torch.linspace(-1, 1, 32 * 64, device=device).reshape(32, 64)
    b = torch.linspace(1, -2, 48 * 64, device=device).reshape(48, 64)
    (qa, sa), (qb, sb) = quantize_rows(a, FP8), quantize_rows(b, FP8)
    try:
        out = torch._scaled_mm(
            qa, qb.t(), scale_a=sa, scale_b=sb.reshape(1, -1), out_dtype=torch.bfloat16
        )
    except RuntimeError as error:
        return f"torch._scaled_mm with rowwise scales fails here: {error}"
    want = a.double() @ b.double().t()
    error = ((out.double() - want).norm() / want.norm()).item()
    # Not `>`, which NaN would pass.
    if not error <= SELF_TEST_MAX_ERROR:
        return f"torch._scaled_mm with rowwise scales errs by {error:.2f} here"
    return None


register(
    Backend(
        "linear",
        "torch",
        30,
        Needs(
            frozenset({"fp8_row"}),
            devices=frozenset({"cuda"}),
            capability=(8, 9),
            k_multiple=16,
            n_multiple=16,
            self_test=self_test,
        ),
        run,
    )
)
