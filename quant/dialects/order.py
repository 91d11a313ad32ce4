"""In which order the block scales of a file lie: one order for the layers of a format.

Numbers of scales, and padding, prove it. A pattern of rows and columns only speaks for it: tiles, a
diagonal or blocks of a weight, as they lie in the right order, are rows in another one. So layers
vote, those that show one, and what the file says of itself stands unless most speak against it;
where as many do, they contradict each other.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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
    """The order of the layers of one format, None where they do not show it, and how it is known.

    layers: which those are. order: `EITHER` where they show only that their scales are not as the
    host has them. votes: layer → the order that its scales speak for, of those that were looked at
    and show one.
    """

    layers: tuple[str, ...]
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


def find_orders(
    layers: Iterable[RawLayer],
    read: Callable[[str, str], torch.Tensor],
    expected: str | None = None,
    asked: str | None = None,
) -> list[Found]:
    """Return the order of the block scales of `layers`, which are of one file, for each format.

    read: (layer, part) → tensor. expected: SWIZZLED where the layers are marked in the host's
    words, FLAT where the metadata name ModelOpt. asked: what the user says, which stands whatever
    they show. Else sizes and padding of one layer decide; then the pattern of rows and columns in
    the scales of most that show one; then what is expected.
    Raises CheckpointError when the sizes contradict each other, OrderError when the rest does.
    """
    kinds = by_kind(layers)
    votes = {kind: _votes(alike, read) for kind, alike in kinds.items()}
    found = []
    for kind, alike in kinds.items():
        order = asked or _proven(votes[kind]) or _elected(votes[kind], expected)
        shown = {v.layer: v.order for v in votes[kind] if v.order}
        names = tuple(layer.name for layer in alike)
        how = "as was said" if asked else _how(votes[kind], order)
        found.append(Found(names, order, how, shown))
    orders = {one.order for one in found if one.votes}
    agrees = expected != SWIZZLED or orders == {SWIZZLED}
    if not asked and agrees and len(orders) == 1:
        # What shows nothing lies as the rest of its file, unless its marking says otherwise.
        how = "as in the file's other layers"
        found = [f if f.votes else Found(f.layers, *orders, how) for f in found]
    return found


def by_kind(layers: Iterable[RawLayer]) -> dict[tuple, list[RawLayer]]:
    """Return those of `layers` that have block scales, by what they are marked and how packed."""
    kinds: dict[tuple, list[RawLayer]] = {}
    for layer in layers:
        if layer.orders():
            kinds.setdefault((layer.marker.get("format"), layer.is_packed), []).append(layer)
    return kinds


def _votes(alike: list[RawLayer], read: Callable[[str, str], torch.Tensor]) -> list[Vote]:
    """Return what those layers of one format say that are looked at."""
    by_size = {o: layer for layer in alike if len(o := frozenset(layer.orders())) == 1}
    if len(by_size) > 1:
        a, b = (layer.name for layer in list(by_size.values())[:2])
        raise CheckpointError(
            f"the block scales of {a} and {b} lie in different orders; quantize the 16-bit file "
            "with `lowbit quantize`"
        )
    for orders, layer in by_size.items():
        if orders == {FLAT}:
            return [Vote(layer.name, FLAT, True, f"{layer.name} has as many as without padding")]
    step = max(len(alike) // SAMPLES, 1)
    # Each from another place of its stretch, so that they are not all one layer of a block.
    places = {i * len(alike) // SAMPLES + i % step for i in range(SAMPLES)}
    seen = [*by_size.values(), *(alike[place] for place in sorted(places))]
    return [_vote(layer, read) for layer in {layer.name: layer for layer in seen}.values()]


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


def _speaks(vote: Vote, expected: str | None) -> bool | None:
    """Return whether a layer speaks for what is expected or against it; None: neither."""
    if vote.order is None or expected is None:
        return None
    return vote.order == expected or (vote.order == EITHER and expected == FLAT)


def _elected(votes: list[Vote], expected: str | None) -> str | None:
    """Return what is expected unless more speak against it than for it, else what most speak for.

    None where none shows any order, unless the metadata name one. Raises OrderError where as many
    speak against what is expected, and where nothing is and neither side is clearly larger.
    """
    count = Counter(v.order for v in votes if v.order)
    sides = Counter(_speaks(v, expected) for v in votes)
    # One layer alone among others of its format is more likely a weight with structure.
    lone = sides[False] == 1 and len(votes) > 1
    if expected and sides[False] == sides[True] > 1:
        raise _contradiction({v.order: v for v in votes if v.order}.values())
    if expected and (lone or sides[False] <= sides[True]):
        return expected if sides[True] or expected == FLAT else None
    if not count:
        return None
    right, wrong = count[SWIZZLED], count.total() - count[SWIZZLED]
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
