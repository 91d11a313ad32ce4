"""In which order the block scales of a file lie: one order for the whole file."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..checkpoint.header import CheckpointError
from ..scale_order import EITHER, FLAT, SWIZZLED, TWICE, proven_order, wrong_order
from .base import RawLayer

# Layers of each format whose scales are looked at, evenly spread over the file.
SAMPLES = 8
ORDERS = {"flat": FLAT, "swizzled": SWIZZLED, "twice": TWICE}


@dataclass(frozen=True)
class Found:
    """An order, None where the file does not show it, and how it is known.

    order: `EITHER` where the file shows only that the scales are not as the host has them.
    """

    order: str | None
    how: str = ""


def find_order(
    layers: Iterable[RawLayer], read: Callable[[str, str], torch.Tensor], from_modelopt: bool
) -> Found:
    """Return the order of the block scales of `layers`, which are of one file.

    read: (layer, part) → tensor. from_modelopt: the metadata names that program. The sizes of one
    layer decide; then the pattern of rows and columns in the scales of some; then the metadata.
    Raises CheckpointError when layers contradict each other.
    """
    scaled = [layer for layer in layers if layer.orders()]
    by_size = {o: layer for layer in scaled if len(o := frozenset(layer.orders())) == 1}
    if len(by_size) > 1:
        a, b = (layer.name for layer in list(by_size.values())[:2])
        raise CheckpointError(f"the block scales of {a} and {b} lie in different orders")
    for orders, layer in by_size.items():
        if orders == {FLAT}:
            return Found(FLAT, f"{layer.name} has as many as without padding")
    proofs = _proofs([*by_size.values(), *_samples(scaled)], read)
    if proofs.keys() & {FLAT, TWICE}:
        proofs.pop(EITHER, None)
    if len(proofs) > 1:
        pairs = " but ".join(f"of {name} {order}" for order, (name, _) in proofs.items())
        raise CheckpointError(f"block scales lie in different orders: {pairs}")
    if from_modelopt and scaled and proofs.keys() <= {EITHER}:
        return Found(FLAT, "its metadata name ModelOpt")
    for order, (name, seen) in proofs.items():
        return Found(order, seen.format(name))
    return Found(None)


def _samples(layers: Iterable[RawLayer]) -> Iterator[RawLayer]:
    kinds: dict[tuple, list[RawLayer]] = {}
    for layer in layers:
        kinds.setdefault((layer.marker.get("format"), layer.is_packed), []).append(layer)
    for alike in kinds.values():
        yield from alike[:: max(len(alike) // SAMPLES, 1)]


def _proofs(
    layers: Iterable[RawLayer], read: Callable[[str, str], torch.Tensor]
) -> dict[str, tuple[str, str]]:
    """Return order, or `EITHER` → (the first layer that proves it, how)."""
    proofs: dict[str, tuple[str, str]] = {}
    for layer in layers:
        # Bytes stand for E4M3 or E8M0; the latter's are exponents, which have the same pattern.
        codes = read(layer.name, "weight_scale").view(torch.uint8)
        dtype = torch.float8_e4m3fn if layer.is_packed else torch.float8_e8m0fnu
        order, deviations = proven_order(codes.view(dtype), *layer.scale_shape)
        order = order or wrong_order(codes.view(dtype), *layer.scale_shape)
        if order:
            seen = "{} has as many as with padding"
            if math.isfinite(deviations):
                seen = f"rows and columns show in {{}}, {deviations:.0f} standard deviations above "
                seen += "chance"
            proofs.setdefault(order, (layer.name, seen))
    return proofs
