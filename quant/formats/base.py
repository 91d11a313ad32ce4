"""What a number format is: one frozen record, and a comfy-kitchen layout that does its arithmetic.

A quantized weight is a comfy-kitchen `QuantizedTensor`: the payload, the name of a registered
layout and the layout's frozen `Params`. Our layouts extend comfy-kitchen's, under names of their
own, so that the host's loading, LoRA, streaming and saving work on them and `ops.linear` does the
product.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, register_layout_class, register_layout_op
from comfy_kitchen.tensor.base import dequantize_args

from ...ops.current_gpu import on_gpu_of
from ...ops.linear import STEP, linear, run_step

# Rows quantized at a time. A multiple of 128, the height of a block of swizzled scales, so that
# joined pieces are byte for byte the whole (after a rotation up to the last bits of its sums);
# small enough to stay in a CPU's caches, and for the allocator to give the same memory again.
CHUNK_ELEMENTS = 1 << 20
SCALE_BLOCK_ROWS = 128
# Magnitudes whose squares neither overflow nor vanish in float32.
SAFE_UNIT = (1e-15, 1e15)


class NotFiniteError(ValueError):
    """A weight holds NaN or Inf."""


@dataclass(frozen=True)
class Format:
    """A number format for weights [N, K].

    `marker` is what the layer's `comfy_quant` JSON holds on disk; `scales` maps the layout's
    parameter names to the tensor names beside `weight`; `optional` are scales that a file may lack.
    `native`: the host loads it without this pack; else `stand_in` is the host's name of a format
    with the same tensors.
    """

    name: str
    title: str
    storage: torch.dtype
    bits: float
    max: float
    group: int | None
    max_error: float
    layout: type
    marker: Mapping[str, Any]
    scales: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    native: bool = True
    stand_in: str | None = None
    k_multiple: int = 1
    pad_multiple: int = 1
    packed: int = 1
    scale_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    quantize_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def unfit(self, shape: tuple[int, ...]) -> str | None:
        """Return why a weight of `shape` cannot take this format, or None when it can."""
        if len(shape) != 2:
            return f"{len(shape)}-D, {self.name} takes [N, K]"
        if 0 in shape:
            return "empty"
        if shape[1] % self.k_multiple:
            return f"K={shape[1]} is not a multiple of {self.k_multiple}"
        return None

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """Return `weight` in this format; see `quantize_measured`."""
        return self.quantize_measured(weight)[0]

    def quantize_measured(
        self, weight: torch.Tensor, tick: Callable[[], None] = lambda: None
    ) -> tuple[QuantizedTensor, float]:
        """Return `weight` in this format and the relative L2 error of its round trip.

        weight: [N, K] float, any strides, never written to; its shape and dtype are kept as the
        logical ones. tick: called before each piece; may raise to stop. The arithmetic is done in
        float32, a few rows at a time. Raises ValueError when the shape does not fit,
        NotFiniteError on NaN or Inf.
        """
        reason = self.unfit(tuple(weight.shape))
        if reason:
            raise ValueError(f"{self.name}: {reason}")
        weight = weight.detach()
        low, high = torch.aminmax(weight)
        largest = torch.maximum(-low.float(), high.float())
        if not torch.isfinite(largest):
            raise NotFiniteError("the weight holds NaN or Inf")
        # The error is measured in this unit, so that no square overflows or vanishes.
        unit = largest.item() or 1.0
        kwargs = dict(self.quantize_kwargs) | self.layout.whole_tensor(weight, largest)
        params, stored = [], None
        start = 0
        wrong = total = 0.0
        for rows in self._chunks(weight):
            tick()
            # Strides would change the order of sums in a rotation, and with it some last bits.
            rows = rows.float().contiguous()
            piece = QuantizedTensor.from_float(rows, self.layout.__name__, **kwargs)
            wrong += _sum_of_squares(piece.dequantize().sub_(rows), unit)
            total += _sum_of_squares(rows, unit)
            params.append(piece._params)
            if stored is None:
                height = -(-weight.shape[0] // self.pad_multiple) * self.pad_multiple
                stored = piece._qdata.new_empty((height, *piece._qdata.shape[1:]))
            stored[start : start + piece._qdata.shape[0]] = piece._qdata
            start += piece._qdata.shape[0]
        joined = _join_params(self.layout, params, weight)
        quantized = QuantizedTensor(stored, self.layout.__name__, joined)
        return quantized, math.sqrt(wrong / total) if total else 0.0

    def _chunks(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = max(CHUNK_ELEMENTS // weight.shape[1], 1)
        rows = -(-rows // SCALE_BLOCK_ROWS) * SCALE_BLOCK_ROWS
        return weight.split(rows)

    def pack(self, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Return the tensors of `weight` on disk: `weight` and its scales, by name."""
        parts = self.layout.state_dict_tensors(weight._qdata, weight._params)
        return {f"weight{suffix}": tensor for suffix, tensor in parts.items()}

    def unpack(
        self,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        shape: tuple[int, int] | None = None,
        marker: Mapping[str, Any] = MappingProxyType({}),
    ) -> QuantizedTensor:
        """Return the weight that `tensors`, as `pack` names them, hold.

        dtype: of the values when dequantized. shape: logical [N, K]; None when the format does not
        pad, or takes the padded shape. marker: the layer's `comfy_quant`. Raises ValueError when a
        scale is missing or of a shape that does not fit, naming it.
        """
        problem = self.mixed(tensors)
        if problem:
            raise ValueError(f"{self.name}: {problem}")
        wanted = ["weight", *(n for n in self.scales.values() if n not in self.optional)]
        missing = [n for n in wanted if n not in tensors]
        if missing:
            raise ValueError(f"{self.name}: {', '.join(missing)} missing")
        stored = self._view("weight", tensors["weight"], self.storage)
        if stored.dim() != 2:
            raise ValueError(f"{self.name}: weight is {stored.dim()}-D, [N, K] is wanted")
        full = (stored.shape[0], stored.shape[1] * self.packed)
        shape = tuple(shape or full)
        if len(shape) != 2 or shape[0] > full[0] or shape[1] > full[1]:
            raise ValueError(f"{self.name}: weight holds {list(full)}, not {list(shape)}")
        values = {
            param: self._scale(name, tensors[name])
            for param, name in self.scales.items()
            if name in tensors
        }
        problem = self.layout.misfit(full, values)
        if problem:
            raise ValueError(f"{self.name}: {problem}")
        options = self.layout.options(flat_marker(marker))
        rotation = options.get("convrot_groupsize", 1)
        if rotation < 1 or full[1] % rotation:
            raise ValueError(f"{self.name}: K={full[1]} is not a multiple of rotation {rotation}")
        params = self.layout.Params(**values, orig_dtype=dtype, orig_shape=shape, **options)
        return QuantizedTensor(stored, self.layout.__name__, params)

    def mixed(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Return why the scales of a block-scaled layer are of another format's kind, or None."""
        weight = tensors.get("weight")
        if self.layout.mixed is None or weight is None or weight.dim() != 2:
            return None
        shape = (weight.shape[0], weight.shape[1] * self.packed)
        return self.layout.mixed(tensors, shape, self.group)

    def _scale(self, name: str, value: torch.Tensor) -> torch.Tensor:
        dtype = self.scale_dtypes.get(name, torch.float32)
        return self._view(name, value, dtype) if dtype.itemsize == 1 else value.to(dtype)

    def _view(self, name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `value` as `dtype`, which writers may have called plain bytes.

        A signed payload of a float format is none: they are numbers under a wrong marking.
        """
        numbers = name == "weight" and dtype.is_floating_point
        plain = {torch.uint8} if numbers else {torch.uint8, torch.int8}
        if value.dtype not in {dtype, *plain}:
            raise ValueError(f"{self.name}: {name} is {value.dtype}, {dtype} is wanted")
        return value.view(dtype)


def _sum_of_squares(x: torch.Tensor, unit: float) -> float:
    """Return the sum of (x / unit)², x float32; a few million elements at most."""
    flat = x.reshape(-1)
    if not SAFE_UNIT[0] < unit < SAFE_UNIT[1]:
        flat = flat / unit
        unit = 1.0
    return torch.dot(flat, flat).item() / unit**2


def flat_marker(marker: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `comfy_quant` marker with the options that older writers put under `params`."""
    params = marker.get("params")
    return {**params, **marker} if isinstance(params, dict) else dict(marker)


def _join_params(layout: type, params: list, weight: torch.Tensor):
    """Return one `Params` for pieces of rows: per-row scales joined, per-tensor scales shared."""
    first = params[0]
    joined = {"orig_dtype": weight.dtype, "orig_shape": tuple(weight.shape)}
    if len(params) > 1:
        for name in first._tensor_fields():
            parts = [getattr(p, name) for p in params]
            shared = name in layout.shared or not parts[0].dim()
            joined[name] = parts[0] if shared else torch.cat(parts)
    return dataclasses.replace(first, **joined)


class LowBitLayout:
    """What every layout of ours adds to comfy-kitchen's; mixed in before it.

    `scheme` names the arithmetic for `ops.linear`; `kitchen_layout` is the registered name of the
    layout that is extended; `shared` are tensors of `Params` that all rows have in common, scalars
    aside; `mixed` tells block scales of another kind, see `_blocks.mixed`.
    """

    scheme: str
    kitchen_layout: str
    shared: frozenset[str] = frozenset()
    mixed: Callable | None = None

    @classmethod
    def quantize(cls, tensor: torch.Tensor, *args, **kwargs):
        """Return (stored, params) of comfy-kitchen's layout, on the GPU that the tensor lies on."""
        with on_gpu_of(tensor):
            return super().quantize(tensor, *args, **kwargs)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params) -> torch.Tensor:
        """Return the values by comfy-kitchen's layout, on the GPU that the weight lies on."""
        with on_gpu_of(qdata):
            return super().dequantize(qdata, params)

    @classmethod
    def whole_tensor(cls, weight: torch.Tensor, largest: torch.Tensor) -> dict[str, Any]:
        """Return the keyword arguments of `quantize` that follow from the whole weight [N, K].

        largest: its largest magnitude, float32.
        """
        return {}

    @classmethod
    def options(cls, marker: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `Params` that are not tensors, from the layer's marker."""
        return {}

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        """Return why scales do not fit a stored weight of padded `shape` [N, K], or None."""
        return None


def _is_transposed(weight: torch.Tensor) -> bool:
    return isinstance(weight, QuantizedTensor) and getattr(weight._params, "transposed", False)


def _linear(qt, args, kwargs):
    x, weight, *rest = args
    bias = rest[0] if rest else kwargs.get("bias")
    if not isinstance(weight, QuantizedTensor) or _is_transposed(weight):
        return torch.nn.functional.linear(*dequantize_args((x, weight)), bias)
    return linear(x, weight, bias)


def _transpose(qt, args, kwargs):
    """Return the weight marked as transposed, its payload and layout as they are."""
    params = dataclasses.replace(
        qt._params,
        orig_shape=tuple(reversed(qt._params.orig_shape)),
        transposed=not qt._params.transposed,
    )
    return QuantizedTensor(qt._qdata, qt._layout_cls, params)


def _mm(qt, args, kwargs):
    x, weight = args
    if _is_transposed(weight):
        return linear(x, _transpose(weight, (), {}))
    return torch.mm(*dequantize_args(args), **kwargs)


def _addmm(qt, args, kwargs):
    bias, x, weight = args
    if _is_transposed(weight) and bias.dim() == 1 and not kwargs:
        return linear(x, _transpose(weight, (), {}), bias)
    return torch.addmm(*dequantize_args(args), **kwargs)


def register_layout(layout: type) -> type:
    """Make a layout known to comfy-kitchen and route `linear` on it to `ops.linear`; decorator.

    Outside inference mode torch makes `linear` a transpose and a product, which are routed there
    too where `Params` can tell that a weight is transposed; elsewhere a transpose dequantizes.
    """
    aten = torch.ops.aten
    register_layout_class(layout.__name__, layout)
    register_layout_op(aten.linear.default, layout)(_linear)
    register_layout_op(STEP, layout)(run_step)
    if "transposed" in {field.name for field in dataclasses.fields(layout.Params)}:
        register_layout_op(aten.t.default, layout)(_transpose)
        register_layout_op(aten.mm.default, layout)(_mm)
        register_layout_op(aten.addmm.default, layout)(_addmm)
    return layout
