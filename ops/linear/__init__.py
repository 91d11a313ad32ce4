"""Linear layers with a quantized weight: y = x · Wᵀ + bias.

The weight is a comfy-kitchen `QuantizedTensor` whose layout class states its `scheme` (the
arithmetic that it stands for, say `fp8_tensor`) and `kitchen_layout` (the layout of comfy-kitchen
that it extends). Every backend gives the same result up to the rounding of the activation.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from .. import registry, tuning
from ..custom_op import watched
from ..quantize_rows import Prologue
from ..replay import Plans
from ..scaled_mm.check import LOW_RANK, is_few
from ..scaled_mm.hopper import HOPPER
from .activation import (
    Kind,
    QuantizedActivation,
    from_host,
    kind_on,
    quantize_activation,
    takes,
)
from .arithmetic import backend_of, with_arithmetic
from .four_bit import FEW_ROWS, GROUPS
from .low_rank import LowRank, add_low_rank, add_product, rescale, scaled, stacked
from .sharing import quantized_once, release, share

OP = "linear"

__all__ = [
    "STEP",
    "Conversion",
    "LowRank",
    "QuantizedActivation",
    "add_low_rank",
    "convert_fp4_linear",
    "convert_fp8_linear",
    "fp8_linear_forward",
    "input_kind",
    "linear",
    "linear_with_terms",
    "quantize_activation",
    "release",
    "rescale",
    "run_step",
    "scaled",
    "share",
    "stacked",
    "with_arithmetic",
]


def linear(
    x: torch.Tensor | QuantizedActivation,
    weight: QuantizedTensor,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
    *,
    input_act: str | None = None,
    low_rank: LowRank | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return residual + gate · (act(x) · Wᵀ + bias), [..., N], in the dtype of `x`.

    x: [..., K] float, any strides, never written to; or an activation that `quantize_activation`
    made for a weight of this kind. weight: [N, K] quantized. bias: [N] or None. backend: `auto`, or
    the name of one that then runs or raises; a weight may name one itself (`with_arithmetic`),
    which `auto` follows. input_act: "gelu_tanh" or None; done in the pass that quantizes x, where
    there is one. low_rank: a term beside the weight, of the same act(x), which is added to the
    product. gate: [R, N], where R divides the rows of x: row i takes gate[i // (rows / R)].
    residual: as the result, contiguous, never written to. These three join while the result is
    still in registers where the backend can.
    Raises ValueError when shapes or kinds do not fit, NoBackendError when no backend can run the
    call.
    """
    chosen = _chosen(weight, x.device, math.prod(x.shape[:-1]), backend, _ranks(low_rank))
    if input_act is None and low_rank is None and _only_launches(chosen, x):
        return _product(chosen, x, weight, bias, gate, residual)
    return _linear(chosen, x, weight, bias, input_act, low_rank, gate, residual)


_PRODUCTS = Plans()


def _only_launches(chosen: registry.Backend, x: torch.Tensor | QuantizedActivation) -> bool:
    """Return whether a product with x is launches alone, of which nobody else has to know."""
    quantized = chosen.launches and isinstance(x, QuantizedActivation)
    return quantized and x.dtype in LOW_RANK and not watched(x.stored)


def _product(
    chosen: registry.Backend, x: QuantizedActivation, weight, bias, gate, residual
) -> torch.Tensor:
    """Return what `linear` does for an activation that is quantized already, prepared once."""
    rows, shape = len(x.stored), (*x.shape[:-1], weight.shape[0])
    if residual is not None and residual.shape == shape:
        residual = residual.reshape(rows, shape[-1])
    elif residual is not None:
        _check_gated(gate, residual, shape)

    def run():
        flat = replace(x, shape=(rows, x.shape[-1]))
        return _linear(chosen, flat, weight, bias, None, None, gate, residual)

    of_weight = (weight._qdata, weight._layout_cls, *vars(weight._params).values())
    of_x = (x.stored, x.scale, x.kind, x.shape[-1], x.dtype)
    return _PRODUCTS.run((of_x, of_weight, bias, chosen.name, gate, residual), run).reshape(shape)


def _linear(
    chosen: registry.Backend, x, weight, bias, input_act, low_rank, gate, residual
) -> torch.Tensor:
    """Return what `linear` describes."""
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"linear: input has {x.shape[-1]} features, weight [{n}, {k}] takes {k}")
    rows = math.prod(x.shape[:-1])
    if isinstance(x, QuantizedTensor):
        x = from_host(x, weight)
    shape, dtype = (*x.shape[:-1], n), x.dtype
    _check_act(x, weight, input_act, chosen.name)
    _check_gated(gate, residual, shape)
    if rows == 0:
        return weight._qdata.new_empty(shape, dtype=dtype, device=x.device)
    given = x
    if not isinstance(x, QuantizedActivation):
        x = _prepared(x, weight, input_act, chosen)
        if low_rank is None and _only_launches(chosen, x):
            return _product(chosen, x, weight, bias, gate, residual)
    term = None
    if low_rank is not None:
        h = low_rank.unprojected(x) if chosen.projects else None
        if h is None:
            h = low_rank.project(x, lambda: _plain(given, input_act))
        term = h, low_rank.up.to(dtype)
    if residual is not None:
        residual = _shaped(residual, (rows, n))
    return _shaped(_run(chosen, x, weight, bias, term, gate, residual), shape)


def _shaped(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return x in `shape`; x itself where it has that."""
    return x if x.shape == shape else x.reshape(shape)


def input_kind(weight: QuantizedTensor, device: torch.device, rows: int) -> Kind | None:
    """Return the kind to which `linear` quantizes floats [rows, K] on `device`; None: to none."""
    chosen = _chosen(weight, device, rows, "auto")
    return kind_on(device, weight, rows, chosen.name) if chosen.quantizes else None


def _ranks(low_rank: LowRank | None) -> int:
    return 0 if low_rank is None else low_rank.up.shape[1]


def _chosen(
    weight, device: torch.device, rows: int, backend: str, ranks: int = 0
) -> registry.Backend:
    """Return the backend for rows of x and a low-rank term of so many ranks."""
    (n, k), scheme = weight.shape, weight.layout_cls.scheme
    # What was tuned was measured without a term.
    m = None if ranks else tuning.bucket_if_tuned(OP, scheme, device, n, k, rows)
    few = None
    if scheme in GROUPS:
        few = rows <= FEW_ROWS
    elif registry.capability(device) == HOPPER:
        # Elsewhere nothing asks, and compiled graphs need not depend on it.
        few = is_few(rows, ranks)
    if few is not None:
        # Of rows that torch.compile knows by a symbol too: its graph is then for few, or for many.
        # `bool` would leave the symbol in.
        few = True if few else False  # noqa: SIM210
    name = backend_of(weight) if backend == "auto" else backend
    return registry.select(OP, registry.Call(scheme, device, n, k, m, few), name)


def _run(chosen: registry.Backend, x, weight, bias, term, gate, residual) -> torch.Tensor:
    """Return residual + gate · (x · Wᵀ + bias + h · upᵀ), [M, N], in the dtype of x.

    term: (h, up) or None. residual: [M, N] or None.
    """
    dtype = x.dtype
    quantized = isinstance(x, QuantizedActivation) and chosen.run_quantized
    if quantized and chosen.fuses and dtype in LOW_RANK:
        options = {"low_rank": term, "gate": gate, "residual": residual}
        return chosen.run_quantized(x, weight, bias, **options).to(dtype)
    if quantized:
        out = chosen.run_quantized(x, weight, bias)
    else:
        out = chosen.run(_plain(x, None).reshape(-1, weight.shape[1]), weight, bias)
    out = add_product(out.to(dtype), *term) if term else out.to(dtype)
    return _gated(out, gate, residual).to(dtype)


def _gated(
    out: torch.Tensor, gate: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """Return residual + gate · out [M, N], by torch; gate [R, N] and residual [M, N], or None."""
    if gate is None:
        return out if residual is None else out + residual
    groups, gate = out.unflatten(0, (gate.shape[0], -1)), gate.unsqueeze(1)
    if residual is None:
        return (groups * gate).flatten(0, 1)
    return residual.unflatten(0, (gate.shape[0], -1)).addcmul(groups, gate).flatten(0, 1)


def _check_gated(gate, residual, shape: tuple[int, ...]) -> None:
    """Raise ValueError when gate and residual do not fit a result of `shape`."""
    rows = math.prod(shape[:-1])
    if gate is not None and (gate.dim() != 2 or gate.shape[1] != shape[-1]):
        raise ValueError(f"linear: gate is {list(gate.shape)}; [rows, {shape[-1]}] is wanted")
    if gate is not None and rows and (not gate.shape[0] or rows % gate.shape[0]):
        raise ValueError(f"linear: gate has {gate.shape[0]} rows, which do not divide {rows}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"linear: residual is {list(residual.shape)}; {list(shape)} is wanted")


def _plain(x: torch.Tensor | QuantizedActivation, input_act: str | None) -> torch.Tensor:
    """Return act(x) in the dtype of x, not quantized."""
    if isinstance(x, QuantizedActivation):
        return x.dequantize()
    return x if input_act is None else F.gelu(x, approximate="tanh")


def _prepared(
    x: torch.Tensor,
    weight: QuantizedTensor,
    input_act: str | None,
    chosen: registry.Backend,
):
    """Return act(x), quantized or not; x itself where nothing is to do."""
    if not chosen.quantizes:
        return _plain(x, input_act)
    kind = kind_on(x.device, weight, math.prod(x.shape[:-1]), chosen.name)
    if input_act is not None:
        prologue = Prologue(activation=input_act)
        return quantize_activation(x, weight, kind=kind, prologue=prologue)
    return quantized_once(x, kind, lambda: quantize_activation(x, weight, kind=kind))


def _check_act(x, weight: QuantizedTensor, input_act: str | None, backend: str) -> None:
    """Raise ValueError when x, quantized or not, is none that `weight` multiplies after the act.

    backend: the one that multiplies.
    """
    if not isinstance(x, QuantizedActivation):
        if input_act is not None:
            # Prologue says which are known.
            Prologue(activation=input_act).check(math.prod(x.shape[:-1]), x.shape[-1])
        return
    if not takes(weight, x.kind, backend):
        wanted = kind_on(x.device, weight, len(x.stored), backend)
        raise ValueError(f"linear: the activation is {x.kind}, the weight multiplies {wanted}")
    if input_act is not None:
        raise ValueError("linear: input_act comes before the quantization of x; give it there")


registry.discover(__name__)

# Last, for they are made of `linear`.
from .convert import Conversion, convert_fp4_linear, convert_fp8_linear  # noqa: E402
from .fp8 import fp8_linear_forward  # noqa: E402
from .terms import STEP, linear_with_terms, run_step  # noqa: E402
