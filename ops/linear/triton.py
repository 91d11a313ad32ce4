"""Our own kernels: the activation is quantized per token, then multiplied in 8 bits."""

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..launch import TRITON_MIN
from ..quantize_rows.triton import K_MAX
from ..registry import Backend, Needs, register
from ..scaled_mm import scaled_mm
from ..scaled_mm.check import K_MULTIPLE
from .activation import QuantizedActivation, quantize_activation


def run_quantized(
    x: QuantizedActivation,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    backend: str = "triton",
    **epilogue: object,
) -> torch.Tensor:
    """Return x · Wᵀ + bias, [M, N]; weight [N, K], bias [N] or None.

    backend, epilogue (low_rank, gate, residual): of `scaled_mm`.
    """
    scale_b = weight._params.scale.contiguous()
    operands = (x.stored, weight._qdata, x.scale, scale_b, bias)
    return scaled_mm(*operands, **epilogue, out_dtype=x.dtype, backend=backend)


def run(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, backend="triton"):
    """Return x · Wᵀ + bias for floats [M, K]. backend: of `quantize_rows` and `scaled_mm`."""
    rows = quantize_activation(x, weight, backend=backend)
    return run_quantized(rows, weight, bias, backend)


def _register(schemes: set[str], least: tuple[int, int]) -> None:
    needs = Needs(
        frozenset(schemes),
        devices=frozenset({"cuda"}),
        capability=least,
        measured=((9, 0), (10, 0)),
        k_multiple=K_MULTIPLE,
        k_max=K_MAX,
        package="triton.tools.tensor_descriptor",
        package_min=TRITON_MIN,
    )
    does = {"quantizes": True, "fuses": True, "launches": True}
    register(Backend("linear", "triton", 10, needs, run, run_quantized, **does))


_register({"int8_row", "int8_row_convrot"}, (8, 0))
_register({"fp8_tensor", "fp8_row"}, (8, 9))
