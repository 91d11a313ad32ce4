"""Activations quantized once, for all the linear layers that read them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ..fp4_scaled_mm import prefers_interleaved
from ..quantize_rows import NOTHING, ROTATION, Prologue, quantize_rows, restore
from ..quantize_rows.order import BLOCK
from ..quantize_rows.reference import prepare, rotate
from .arithmetic import AUTO, backend_of
from .four_bit import EIGHT_BITS, GROUPS, has_fp8, rotation_of

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def version(x: torch.Tensor) -> int | None:
    """Return the count of writes to x; None of tensors of inference mode, which have no such count.

    None while torch.compile is at work, too: what it follows is written to by nobody.
    """
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class Kind(NamedTuple):
    """What a weight multiplies: `dtype`, rotated over `rotation` columns at a time (0: not).

    interleaved: columns lie in the order in which FP8 meets packed 4-bit weights (`interleave`).
    """

    dtype: torch.dtype
    rotation: int
    interleaved: bool = False


@dataclass(frozen=True)
class QuantizedActivation:
    """x ≈ stored · scale, after the rotation of its kind, its columns in the order of its kind.

    stored: [M, K] INT8 or FP8. scale: float32, [M, 1] or one element. shape: of x, [..., K]. dtype:
    of x and of what linear layers make of it. made: what layers made of it that others may read, by
    a key of theirs; made anew after writes to it. Tensors of inference mode tell of none: leave
    these be.
    """

    stored: torch.Tensor
    scale: torch.Tensor
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    made: dict[Hashable, tuple[tuple, torch.Tensor]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def once(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return `make()`, or what it returned for the same key and values before."""
        writes = version(self.stored), version(self.scale)
        found = self.made.get(key)
        if found is None or found[0] != writes:
            found = self.made[key] = writes, make()
        return found[1]

    def dequantize(self) -> torch.Tensor:
        """Return x as it was rounded, [..., K]."""
        value = self.in_order().float() * self.scale
        if self.kind.rotation:
            # The matrix is symmetric and its own inverse.
            value = rotate(value, self.kind.rotation)
        return value.to(self.dtype).reshape(self.shape)

    def in_order(self) -> torch.Tensor:
        """Return `stored` with its columns as those of x, [M, K]."""
        return restore(self.stored) if self.kind.interleaved else self.stored


def kind_of(weight: QuantizedTensor) -> Kind | None:
    """Return the kind of activation that `weight` multiplies as stored, None for other formats."""
    stored, params = weight._qdata, weight._params
    if not weight.layout_cls.scheme.startswith(("int8_row", "fp8_")):
        return None
    rotation = params.convrot_groupsize if getattr(params, "convrot", False) else 0
    # An E5M2 weight takes an E4M3 activation, which is the finer of the two.
    dtype = torch.int8 if stored.dtype == torch.int8 else torch.float8_e4m3fn
    return Kind(dtype, rotation)


def kind_on(
    device: torch.device, weight: QuantizedTensor, rows: int, backend: str = AUTO
) -> Kind | None:
    """Return the kind of [rows, K] to quantize to for `weight` on `device`; None: to none.

    A 4-bit weight is multiplied as FP8 where the GPU has it, interleaved where so few rows are
    faster multiplied so, else as INT8, rotated where K allows, unless the backend of `linear`, or
    with `auto` the weight, asks for one of them.
    """
    scheme = weight.layout_cls.scheme
    if scheme not in GROUPS:
        return kind_of(weight)
    named = EIGHT_BITS.get(backend_of(weight) if backend == AUTO else backend)
    if named == torch.float8_e4m3fn or (named is None and has_fp8(device)):
        interleaved = prefers_interleaved(scheme, device, *weight.shape, rows)
        return Kind(torch.float8_e4m3fn, 0, interleaved)
    return Kind(torch.int8, rotation_of(tuple(weight.shape)))


def takes(weight: QuantizedTensor, kind: Kind, backend: str = AUTO) -> bool:
    """Return whether `weight` multiplies activations of `kind`, by a backend of `linear`.

    4-bit weights do several, unless the backend, or with `auto` the weight, asks for one.
    """
    if weight.layout_cls.scheme not in GROUPS:
        return fits(kind, kind_of(weight))
    named = EIGHT_BITS.get(backend_of(weight) if backend == AUTO else backend)
    if named not in (None, kind.dtype):
        return False
    if kind.dtype == torch.int8:
        return kind.rotation in (0, rotation_of(tuple(weight.shape))) and not kind.interleaved
    if kind.interleaved and weight.shape[1] % BLOCK:
        return False
    return kind.dtype in FP8 and not kind.rotation


def quantize_activation(
    x: torch.Tensor,
    weight: QuantizedTensor,
    *,
    kind: Kind | None = None,
    prologue: Prologue = NOTHING,
    input_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> QuantizedActivation:
    """Return x after `prologue`, quantized as `weight` multiplies it, for any number of `linear`.

    x: [..., K] bf16, fp16 or fp32, never written to. kind: None, or one of those that a 4-bit
    weight multiplies. prologue, input_scale, backend: as `quantize_rows` has them. Raises
    ValueError when the weight's format takes no 8-bit activation, or none of `kind`.
    """
    if kind is not None and not takes(weight, kind):
        raise ValueError(
            f"quantize_activation: weights of {weight.layout_cls.scheme} do not multiply {kind}"
        )
    flat = x.reshape(-1, x.shape[-1])
    kind = kind or kind_on(x.device, weight, flat.shape[0])
    if kind is None:
        raise ValueError(
            f"quantize_activation: weights of {weight.layout_cls.scheme} take no 8-bit activation; "
            "give the linear layer x itself"
        )
    if kind.rotation not in (0, ROTATION):
        flat = rotate(flat if prologue == NOTHING else prepare(flat, prologue), kind.rotation)
        prologue = NOTHING
    stored, scale = quantize_rows(
        flat,
        kind.dtype,
        kind.rotation == ROTATION,
        backend,
        prologue=prologue,
        input_scale=input_scale,
        interleaved=kind.interleaved,
    )
    return QuantizedActivation(stored, scale, kind, tuple(x.shape), x.dtype)


def from_host(x: QuantizedTensor, weight: QuantizedTensor) -> QuantizedActivation | torch.Tensor:
    """Return x as `linear` takes it, from the host's own quantization of activations.

    That is FP8 with a static scale, which `weight` may multiply as it is; else x is dequantized.
    """
    kind = Kind(x._qdata.dtype, 0)
    static = kind.dtype in FP8 and x._params.scale.numel() == 1
    if not static or not fits(kind, kind_of(weight)):
        return x.dequantize()
    stored = x._qdata.reshape(-1, x.shape[-1])
    return QuantizedActivation(stored, x._params.scale, kind, tuple(x.shape), x.dtype)


def fits(kind: Kind, wanted: Kind | None) -> bool:
    """Return whether a weight that multiplies `wanted` multiplies `kind`: both FP8 types do."""
    if wanted is None or kind[1:] != wanted[1:]:
        return False
    return kind.dtype == wanted.dtype or (kind.dtype in FP8 and wanted.dtype in FP8)
