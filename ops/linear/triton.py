"""Our own kernels: the activation is quantized per token, then multiplied in 8 bits."""

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..quantize_rows import ROTATION, quantize_rows
from ..quantize_rows.reference import rotate
from ..quantize_rows.triton import K_MAX
from ..registry import Backend, Needs, register
from ..scaled_mm import scaled_mm
from ..scaled_mm.check import K_MULTIPLE


def run(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    backend: str = "triton",
) -> torch.Tensor:
    """Return x · Wᵀ + bias, x quantized per token; x [M, K], weight [N, K], bias [N] or None.

    backend: of `quantize_rows` and `scaled_mm`.
    """
    stored, params = weight._qdata, weight._params
    width = params.convrot_groupsize if getattr(params, "convrot", False) else 0
    if width not in (0, ROTATION):
        x = rotate(x, width)
    # An E5M2 weight takes an E4M3 activation, which is the finer of the two.
    dtype = torch.int8 if stored.dtype == torch.int8 else torch.float8_e4m3fn
    out_dtype = x.dtype
    rows, scale = quantize_rows(x, dtype, width == ROTATION, backend)
    scale_b = params.scale.contiguous()
    return scaled_mm(rows, stored, scale, scale_b, bias, out_dtype=out_dtype, backend=backend)


def _register(schemes: set[str], least: tuple[int, int]) -> None:
    needs = Needs(
        frozenset(schemes),
        devices=frozenset({"cuda"}),
        capability=least,
        measured=((9, 0), (10, 0)),
        k_multiple=K_MULTIPLE,
        k_max=K_MAX,
        package="triton.tools.tensor_descriptor",
    )
    register(Backend("linear", "triton", 10, needs, run))


_register({"int8_row", "int8_row_convrot"}, (8, 0))
_register({"fp8_tensor", "fp8_row"}, (8, 9))
