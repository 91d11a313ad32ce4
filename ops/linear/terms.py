"""A product and its low-rank terms: one call, which is one step of a compiled graph.

torch.compile cannot make a quantized matrix out of others, nor read the layout of one that came up
within the graph; an operation that takes them whole lets comfy-kitchen's dispatch do both, below
the compiler's eyes: there the steps are those that run without it.
"""

from collections.abc import Sequence

import torch

from ..custom_op import custom_op
from . import linear
from .activation import Kind, QuantizedActivation
from .low_rank import LowRank, stacked

# Where layers in a compiled graph leave what they made of an activation, on it.
MADE = "_lowbit_made"


def linear_with_terms(
    x: torch.Tensor | QuantizedActivation,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Sequence[LowRank],
    *,
    input_act: str | None = None,
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what `linear` does with the sum of `terms`, of which there is one at least.

    In a compiled graph `weight` is quantized, in a layout that comfy-kitchen has `run_step` for.
    Raises ValueError without terms, and what `linear` raises.
    """
    if not terms:
        raise ValueError("linear_with_terms: there are no terms; one is wanted, else call linear")
    if not torch.compiler.is_compiling():
        return _linear(x, weight, bias, terms, input_act, gate, residual)
    scale, kind, dtype, shape = None, (0, False), x.dtype, x.shape
    if isinstance(x, QuantizedActivation):
        scale, kind, x = x.scale, x.kind[1:], x.stored
        residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
    given = (x, scale, *kind, dtype, weight, bias)
    matrices = [term.down for term in terms], [term.up for term in terms]
    constants = [term.factor for term in terms], [term.shift for term in terms]
    rows = [end for term in terms for end in term.rows or (0, term.down.shape[0])]
    shared = [term.key is not None for term in terms]
    options = (rows, shared, input_act, gate, residual)
    out = _OP(*given, *matrices, *constants, *options)
    return out.reshape((*shape[:-1], out.shape[-1]))


def _linear(x, weight, bias, terms, input_act, gate, residual):
    options = {"input_act": input_act, "gate": gate, "residual": residual}
    return linear(x, weight, bias, low_rank=stacked(terms), **options)


def _run(x, scale, rotation, interleaved, dtype, weight, bias, *rest):
    *parts, shared, input_act, gate, residual = rest
    if scale is not None:
        # Other steps of the graph get the same tensor.
        made = vars(x).setdefault(MADE, {})
        kind = Kind(x.dtype, rotation, interleaved)
        x = QuantizedActivation(x, scale, kind, tuple(x.shape), dtype, made)
    *columns, rows = parts
    ends = zip(rows[::2], rows[1::2], strict=True)
    # All rows are none in particular, as without compiling.
    ends = [
        None if end == (0, len(down)) else end for end, down in zip(ends, columns[0], strict=True)
    ]
    keys = [down if one else None for down, one in zip(columns[0], shared, strict=True)]
    terms = [LowRank(*part) for part in zip(*columns, ends, keys, strict=True)]
    return _linear(x, weight, bias, terms, input_act, gate, residual)


def _empty(x, scale, rotation, interleaved, dtype, weight, *rest):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


_OP = custom_op(
    "linear_with_terms(Tensor x, Tensor? scale, int rotation, bool interleaved, ScalarType dtype, "
    "Tensor weight, Tensor? bias, Tensor[] downs, Tensor[] ups, Tensor?[] factors, "
    "Tensor?[] shifts, int[] rows, bool[] shared, str? input_act, Tensor? gate, "
    "Tensor? residual) -> Tensor",
    _run,
    _empty,
)
# What comfy-kitchen is to call for it, in the layouts of quantized weights.
STEP = torch.ops.lowbit.linear_with_terms.default


def run_step(_, args, kwargs) -> torch.Tensor:
    """Return the result of the step for comfy-kitchen's dispatch."""
    return _run(*args, **kwargs)
