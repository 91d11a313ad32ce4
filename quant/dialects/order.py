"""In which order the block scales of a file lie: one order for the whole file.

Numbers of scales, and padding, prove it. A pattern of rows and columns only speaks for it: tiles, a
diagonal or blocks of a weight, as they lie in the right order, are rows in another one. So layers
vote, and what the file says of itself counts more than a few of them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..checkpoint.header import CheckpointError
from ..scale_order import EITHER, FLAT, SWIZZLED, TWICE, proven_order, wrong_order
from .base import RawLayer

# Layers of each format whose scales are looked at, evenly spread over the file.
SAMPLES = 8
ORDERS = {"flat": FLAT, "swizzled": SWIZZLED, "twice": TWICE}
# How many times more layers must speak for one order than for another where nothing is expected.
CLEARER = 2


class OrderError(CheckpointError):
    """Layers of one file contradict each other. orders: what may be true, of `ORDERS`."""

    def __init__(self, message: str, orders: Iterable[str]):
        super().__init__(message)
        self.orders = tuple(orders)


@dataclass(frozen=True)
class Found:
    """An order, None where the file does not show it, and how it is known.

    order: `EITHER` where the file shows only that the scales are not as the host has them. votes:
    layer → the order that its scales speak for, of those that were looked at and show one.
    """

    order: str | None
    how: str = ""
    votes: Mapping[str, str] = field(default_factory=dict)

    @property
    def against(self) -> dict[str, str]:
        """The votes for another order, layer → that one."""
        same = {self.order} | ({EITHER} if self.order in (FLAT, TWICE) else set())
        same |= {FLAT, TWICE} if self.order == EITHER else set()
        return {name: order for name, order in self.votes.items() if order not in same}


@dataclass(frozen=True)
class Vote:
    """What a layer's scales speak for; None: nothing. proven: whether nothing else can be true."""

    layer: str
    order: str | None
    proven: bool
    how: str


def find_order(
    layers: Iterable[RawLayer],
    read: Callable[[str, str], torch.Tensor],
    expected: str | None = None,
) -> Found:
    """Return the order of the block scales of `layers`, which are of one file.

    read: (layer, part) → tensor. expected: SWIZZLED where the layers are marked in the host's
    words, FLAT where the metadata name ModelOpt. Sizes and padding of one layer decide; then the
    pattern of rows and columns in the scales of most that are looked at; then what is expected.
    Raises CheckpointError when the sizes contradict each other, OrderError when the rest does.
    """
    scaled = [layer for layer in layers if layer.orders()]
    by_size = {o: layer for layer in scaled if len(o := frozenset(layer.orders())) == 1}
    if len(by_size) > 1:
        a, b = (layer.name for layer in list(by_size.values())[:2])
        raise CheckpointError(
            f"the block scales of {a} and {b} lie in different orders; quantize the 16-bit file "
            "with `lowbit quantize`"
        )
    for orders, layer in by_size.items():
        if orders == {FLAT}:
            return Found(FLAT, f"{layer.name} has as many as without padding")
    seen = {layer.name: layer for layer in [*by_size.values(), *_samples(scaled)]}
    votes = [_vote(layer, read) for layer in seen.values()]
    order = _proven(votes) or _elected(votes, expected)
    return Found(order, _how(votes, order), {v.layer: v.order for v in votes if v.order})


def _samples(layers: Iterable[RawLayer]) -> Iterator[RawLayer]:
    kinds: dict[tuple, list[RawLayer]] = {}
    for layer in layers:
        kinds.setdefault((layer.marker.get("format"), layer.is_packed), []).append(layer)
    for alike in kinds.values():
        step = max(len(alike) // SAMPLES, 1)
        # Each from another place of its stretch, so that they are not all one layer of a block.
        places = {i * len(alike) // SAMPLES + i % step for i in range(SAMPLES)}
        yield from (alike[place] for place in sorted(places))


def _vote(layer: RawLayer, read: Callable[[str, str], torch.Tensor]) -> Vote:
    # Bytes stand for E4M3 or E8M0; the latter's are exponents, which have the same pattern.
    codes = read(layer.name, "weight_scale").view(torch.uint8)
    dtype = torch.float8_e4m3fn if layer.is_packed else torch.float8_e8m0fnu
    order, deviations = proven_order(codes.view(dtype), *layer.scale_shape)
    order = order or wrong_order(codes.view(dtype), *layer.scale_shape)
    how = (
        f"rows and columns show in {layer.name}, {deviations:.0f} standard deviations above chance"
    )
    if len(layer.orders()) == 1:
        how = f"{layer.name} has as many as with padding"
    return Vote(layer.name, order, math.isinf(deviations), how)


def _proven(votes: list[Vote]) -> str | None:
    proven = {v.order: v for v in votes if v.proven}
    if len(proven) > 1:
        raise _contradiction(proven.values())
    return next(iter(proven), None)


def _elected(votes: list[Vote], expected: str | None) -> str | None:
    """Return the order that most layers speak for, or what is expected unless most contradict it.

    None where none shows any, unless the metadata name one. Raises OrderError where nothing is
    expected, or not by most, and neither side is clearly larger.
    """
    count = Counter(v.order for v in votes if v.order)
    right, wrong = count[SWIZZLED], count.total() - count[SWIZZLED]
    if expected == SWIZZLED and 2 * wrong <= len(votes):
        return SWIZZLED if right else None
    if expected == FLAT and 2 * (right + count[TWICE]) <= len(votes):
        return FLAT if votes else None
    if not count:
        return None
    definite = sorted(count.keys() - {EITHER, SWIZZLED})
    if right and definite and max(right, wrong) < CLEARER * min(right, wrong):
        raise _contradiction({v.order: v for v in votes if v.order}.values())
    if right >= wrong:
        return SWIZZLED
    return definite[0] if len(definite) == 1 else EITHER


def _contradiction(votes: Iterable[Vote]) -> OrderError:
    pairs = " but ".join(f"of {v.layer} {v.order}" for v in votes)
    found = {v.order for v in votes}
    orders = [o for o in ORDERS.values() if o in found or (EITHER in found and o != SWIZZLED)]
    return OrderError(f"block scales lie in different orders: {pairs}", orders)


def _how(votes: list[Vote], order: str | None) -> str:
    own = [v.how for v in votes if v.order == order]
    if order and not own:
        return "its metadata name ModelOpt" if order == FLAT else "they show no one order"
    return own[0] if own else ""
