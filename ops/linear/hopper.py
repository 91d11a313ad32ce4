"""Our own kernels for many rows on Hopper: as `triton`, but for the product, which is CUDA C++."""

import functools

from ..launch import TRITON_MIN
from ..quantize_rows.triton import K_MAX
from ..registry import Backend, Needs, register
from ..scaled_mm import hopper
from ..scaled_mm.check import K_MULTIPLE
from .activation import quantize_activation
from .triton import run_quantized

PRODUCT = "hopper"


def run(x, weight, bias):
    """Return x · Wᵀ + bias for floats [M, K]; weight [N, K], bias [N] or None."""
    return run_quantized(quantize_activation(x, weight), weight, bias, PRODUCT)


NEEDS = Needs(
    frozenset({"int8_row", "int8_row_convrot", "fp8_tensor", "fp8_row"}),
    devices=frozenset({"cuda"}),
    capability=hopper.HOPPER,
    measured=hopper.NEEDS.measured,
    few=False,
    k_multiple=K_MULTIPLE,
    n_multiple=hopper.COLUMNS,
    k_max=K_MAX,
    package="triton.tools.tensor_descriptor",
    package_min=TRITON_MIN,
    self_test=hopper.NEEDS.self_test,
)
register(
    Backend(
        *("linear", PRODUCT, 5, NEEDS, run),
        functools.partial(run_quantized, backend=PRODUCT),
        quantizes=True,
        fuses=True,
        projects=True,
        launches=True,
    )
)
