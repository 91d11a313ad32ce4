"""Linear layers with a quantized weight: y = x · Wᵀ + bias.

The weight is a comfy-kitchen `QuantizedTensor` whose layout class states its `scheme` (the
arithmetic that it stands for, say `fp8_tensor`) and `kitchen_layout` (the layout of comfy-kitchen
that it extends). Every backend gives the same result up to the rounding of the activation.
"""

import math

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from .. import registry, tuning
from ..quantize_rows import Prologue
from ..scaled_mm.check import LOW_RANK, is_few
from ..scaled_mm.hopper import HOPPER
from ..widen_rows import widen_rows
from .activation import (
    Kind,
    QuantizedActivation,
    from_host,
    kind_of,
    kind_on,
    quantize_activation,
    takes,
)
from .arithmetic import backend_of, with_arithmetic
from .four_bit import FEW_ROWS, GROUPS
from .low_rank import (
    HEADROOM,
    LowRank,
    add_low_rank,
    add_product,
    adds_in_8_bits,
    joins,
    plain,
    rescale,
    scaled,
    stacked,
)
from .sharing import quantized_once, release, share

OP = "linear"

__all__ = [
    "Conversion",
    "LowRank",
    "QuantizedActivation",
    "add_low_rank",
    "adds_in_8_bits",
    "convert_fp4_linear",
    "convert_fp8_linear",
    "fp8_linear_forward",
    "input_kind",
    "linear",
    "quantize_activation",
    "release",
    "rescale",
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
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"linear: input has {x.shape[-1]} features, weight [{n}, {k}] takes {k}")
    rows = math.prod(x.shape[:-1])
    chosen = _chosen(weight, x.device, rows, backend, low_rank)
    if isinstance(x, QuantizedTensor):
        x = from_host(x, weight)
    shape, dtype = (*x.shape[:-1], n), x.dtype
    _check_act(x, weight, input_act)
    _check_gated(gate, residual, shape)
    if rows == 0:
        return weight._qdata.new_empty(shape, dtype=dtype, device=x.device)
    given, one_sum = x, False
    if not isinstance(x, QuantizedActivation):
        one_sum = chosen.fuses and not chosen.projects and dtype in LOW_RANK
        one_sum = one_sum and joins(low_rank, weight, x.device, rows)
        x = _prepared(x, weight, input_act, chosen.quantizes, HEADROOM if one_sum else 0)
    term = None
    if low_rank is not None:
        h = low_rank.unprojected(x) if chosen.projects else None
        if h is None:
            h = low_rank.project(x, lambda: _plain(given, input_act))
        term = _joined(h, x, low_rank.up, weight) if one_sum else (h, plain(low_rank.up).to(dtype))
    if residual is not None:
        residual = residual.reshape(rows, n)
    return _run(chosen, x, weight, bias, term, gate, residual).reshape(shape)


def input_kind(weight: QuantizedTensor, device: torch.device, rows: int) -> Kind | None:
    """Return the kind to which `linear` quantizes floats [rows, K] on `device`; None: to none."""
    chosen = _chosen(weight, device, rows, "auto")
    return kind_on(device, weight) if chosen.quantizes else None


def _chosen(
    weight, device: torch.device, rows: int, backend: str, low_rank: LowRank | None = None
) -> registry.Backend:
    (n, k), scheme = weight.shape, weight.layout_cls.scheme
    m = tuning.bucket_if_tuned(OP, scheme, device, n, k, rows)
    few = None
    if scheme in GROUPS:
        few = rows <= FEW_ROWS
    elif registry.capability(device) == HOPPER:
        # Elsewhere nothing asks, and compiled graphs need not depend on it.
        few = is_few(rows, 0 if low_rank is None else low_rank.up.shape[1])
    name = backend_of(weight) if backend == "auto" else backend
    return registry.select(OP, registry.Call(scheme, device, n, k, m, few), name)


def _joined(h, x: QuantizedActivation, up: QuantizedTensor, weight: QuantizedTensor):
    """Return (h, up) in 8 bits, in the units of x, which are made to fit, and of the weight."""
    of_up, of_weight = up._params.scale, weight._params.scale
    return widen_rows(h, x.stored, x.scale, of_up, of_weight), up._qdata


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
    x: torch.Tensor, weight: QuantizedTensor, input_act: str | None, quantize: bool, headroom: int
):
    """Return act(x), quantized with so much headroom or not; x itself where nothing is to do."""
    if not quantize:
        return _plain(x, input_act)
    if input_act is not None:
        act = Prologue(activation=input_act)
        return quantize_activation(x, weight, prologue=act, headroom=headroom)
    return quantized_once(
        x,
        (kind_on(x.device, weight), headroom),
        lambda: quantize_activation(x, weight, headroom=headroom),
    )


def _check_act(x, weight: QuantizedTensor, input_act: str | None) -> None:
    """Raise ValueError when x, quantized or not, is none that `weight` multiplies after the act."""
    if not isinstance(x, QuantizedActivation):
        if input_act is not None:
            # Prologue says which are known.
            Prologue(activation=input_act).check(math.prod(x.shape[:-1]), x.shape[-1])
        return
    if not takes(weight, x.kind):
        raise ValueError(
            f"linear: the activation is {x.kind}, the weight multiplies {kind_of(weight)}"
        )
    if input_act is not None:
        raise ValueError("linear: input_act comes before the quantization of x; give it there")


registry.discover(__name__)

# Last, for they are made of `linear`.
from .convert import Conversion, convert_fp4_linear, convert_fp8_linear  # noqa: E402
from .fp8 import fp8_linear_forward  # noqa: E402
