"""A low-rank term beside a weight, as LoRAs are: y = W·x + U·(f ∘ (D·x) + c).

W is left as it is, whatever its format. D may be quantized in the format of W: then it multiplies
the activation that W's product quantizes anyway, and is read with it once. Layers that read the
same tensor may have their Ds in one matrix, of which each takes its rows.
Source: LoRA, arXiv 2106.09685, section 4.1; f holds strength · alpha / rank, column by column.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ..scaled_mm.check import LOW_RANK, MADE_RANKS, Down
from .activation import Kind, QuantizedActivation, fits, kind_of, version
from .sharing import quantized_once


@dataclass(frozen=True)
class LowRank:
    """The term of one layer [N, K], of rank R.

    down: [G, K] float or quantized, of which `rows`, from the first to before the last, are this
    layer's R; None: all.
    up: [N, R] float. factor: [G] float32, or None where the scales of a quantized `down` hold it
    (`scaled`). shift: [G] float32 or None, added after the factor; with a row of zeros in `down` it
    makes a bias of a column of `up`. key: of the product with `down`, which layers that share
    `down` and an input, announced (`sharing.share`) or quantized before, compute once.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: torch.Tensor | None
    shift: torch.Tensor | None = None
    rows: tuple[int, int] | None = None
    key: object = None

    def project(
        self, x: torch.Tensor | QuantizedActivation, plain: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return factor · x·downᵀ + shift, this layer's [M, R], in the dtype of x.

        x: [..., K], as the weight's product takes it. plain: gives it before it was quantized.
        """
        given = x if self._takes(x) else plain()
        if self.key is None:
            h = self._product(given)
        elif isinstance(given, QuantizedActivation):
            h = given.once(self._name(), lambda: self._product(given))
        else:
            h = quantized_once(given, self._name(), lambda: self._product(given))
        return h if self.rows is None else h[:, slice(*self.rows)]

    def _name(self) -> tuple:
        """Return the name of the product: `key`, and how often its parts were written to.

        Another strength is written into the same tensors.
        """
        down = self.down
        parts = (down._qdata, down._params.scale) if isinstance(down, QuantizedTensor) else (down,)
        constants = (t for t in (self.factor, self.shift) if t is not None)
        return "low rank", self.key, *map(version, (*parts, *constants))

    def unprojected(self, x: torch.Tensor | QuantizedActivation) -> Down | None:
        """Return the first product as `scaled_mm` makes it within the second; None: it cannot.

        Not where layers share it: it is made once, then.
        """
        quantized = isinstance(x, QuantizedActivation) and isinstance(self.down, QuantizedTensor)
        if not quantized or self.key is not None or self.rows is not None or not self._takes(x):
            return None
        down = self.down if self.factor is None else scaled(self.down, self.factor)
        scale = down._params.scale
        one_each = scale.numel() == len(down._qdata) <= MADE_RANKS
        if not one_each or down._qdata.dtype != x.stored.dtype or x.dtype not in LOW_RANK:
            return None
        return Down(down._qdata, scale.reshape(-1, 1).contiguous(), self.shift)

    def _takes(self, x: torch.Tensor | QuantizedActivation) -> bool:
        return not isinstance(x, QuantizedActivation) or self.multiplies(x.kind)

    def multiplies(self, kind: Kind) -> bool:
        """Return whether `down` multiplies activations of `kind` as they are."""
        return isinstance(self.down, QuantizedTensor) and fits(kind, kind_of(self.down))

    def _product(self, x: torch.Tensor | QuantizedActivation) -> torch.Tensor:
        if isinstance(self.down, QuantizedTensor):
            from . import linear

            down = self.down if self.factor is None else scaled(self.down, self.factor)
            return linear(x, down, self.shift).reshape(-1, len(down))
        h = F.linear(x, self.down.to(x.dtype)).reshape(-1, len(self.down)).float() * self.factor
        return (h if self.shift is None else h + self.shift).to(x.dtype)


def stacked(terms: Sequence[LowRank]) -> LowRank:
    """Return the sum of several terms of one layer: ranks side by side.

    Copies their matrices, as small as they are. Where one is quantized and another is not, all
    are dequantized.
    """
    if len(terms) == 1:
        return terms[0]
    parts = [_own_rows(term) for term in terms]
    downs = [part.down for part in parts]
    factors = [_per_row(part, part.factor, 1.0) for part in parts]
    shifts = torch.cat([_per_row(part, part.shift, 0.0) for part in parts])
    if all(isinstance(d, QuantizedTensor) and d._layout_cls == downs[0]._layout_cls for d in downs):
        down = _joined(downs)
    else:
        down = torch.cat([d.dequantize() if isinstance(d, QuantizedTensor) else d for d in downs])
    up = torch.cat([part.up for part in parts], dim=1)
    held = isinstance(down, QuantizedTensor) and all(part.factor is None for part in parts)
    return LowRank(down, up, None if held else torch.cat(factors), shifts)


def _per_row(part: LowRank, value: torch.Tensor | None, default: float) -> torch.Tensor:
    if value is not None:
        return value
    return torch.full((part.down.shape[0],), default, device=part.up.device)


def _own_rows(term: LowRank) -> LowRank:
    """Return a term whose `down` has no rows of other layers."""
    if term.rows is None:
        return term
    rows, down = slice(*term.rows), term.down
    if isinstance(down, QuantizedTensor):
        own = down._qdata[rows], down._params.scale.reshape(-1, 1)[rows]
        down = _like(down, *own)
    else:
        down = down[rows]
    shift = None if term.shift is None else term.shift[rows]
    factor = None if term.factor is None else term.factor[rows]
    return LowRank(down, term.up, factor, shift)


def _joined(weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
    stored = torch.cat([w._qdata for w in weights])
    return _like(weights[0], stored, torch.cat([w._params.scale.reshape(-1, 1) for w in weights]))


def _like(weight: QuantizedTensor, stored: torch.Tensor, scale: torch.Tensor) -> QuantizedTensor:
    """Return rows with a scale each, [G, 1], in the layout of `weight`."""
    shape = (stored.shape[0], weight.shape[1])
    params = dataclasses.replace(weight._params, scale=scale, orig_shape=shape)
    return QuantizedTensor(stored, weight._layout_cls, params)


def scaled(weight: QuantizedTensor, factor: torch.Tensor) -> QuantizedTensor:
    """Return a weight [G, K] with a scale per row, each row times its factor; stored values shared.

    torch.compile breaks the graph here: within one, `LowRank` takes what was scaled before.
    Raises ValueError when its scale is not one per row.
    """
    scale = weight._params.scale
    if scale.numel() != len(factor):
        raise ValueError(
            f"low rank: down has {scale.numel()} scales, one per row ({len(factor)}) is wanted"
        )
    params = dataclasses.replace(weight._params, scale=scale * factor.reshape(scale.shape))
    return QuantizedTensor(weight._qdata, weight._layout_cls, params)


def rescale(made: QuantizedTensor, weight: QuantizedTensor, factor: torch.Tensor) -> None:
    """Write other factors into what `scaled` made of a weight."""
    scale = weight._params.scale
    made._params.scale.copy_(scale * factor.reshape(scale.shape))


def add_product(out: torch.Tensor, h: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return out + h · upᵀ; written into `out` [..., N] unless gradients are wanted. h: [M, R]."""
    flat = out.reshape(-1, out.shape[-1])
    h, up = h.to(out.dtype), up.to(out.dtype)
    if torch.is_grad_enabled() and (out.requires_grad or h.requires_grad or up.requires_grad):
        flat = torch.addmm(flat, h, up.t())
    else:
        flat.addmm_(h, up.t())
    return flat.reshape(out.shape)


def add_low_rank(out: torch.Tensor, x: torch.Tensor, low_rank: LowRank) -> torch.Tensor:
    """Return out + the term of x: what `linear(…, low_rank=…)` adds, for a result of anything else.

    out: [..., N], written to. x: [..., K] float.
    """
    return add_product(out, low_rank.project(x, lambda: x), low_rank.up)
