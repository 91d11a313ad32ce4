"""What the layers of a block have in common: an input that several read, a GELU between two.

Nothing here changes a class or another's module: layers are announced by hooks on modules of our
own, and a feed-forward is replaced by a copy that has the same children.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch

from ..ops.linear import share
from ..quant.families.base import Family, FeedForward


def share_inputs(layers: Mapping[str, torch.nn.Module], family: Family) -> None:
    """Let layers that read the same tensor quantize it once, by a hook on each.

    layers: by name, all of our own.
    """
    for group in family.shared_inputs:
        for name in layers:
            if not name.endswith(f".{group[0]}"):
                continue
            block = name.removesuffix(group[0])
            readers = [layers[block + part] for part in group if block + part in layers]
            for layer in readers if len(readers) > 1 else ():
                layer.register_forward_pre_hook(_Announcement(len(readers)))


class _Announcement:
    """A forward hook that announces a layer's input as shared."""

    def __init__(self, readers: int):
        self.readers = readers

    def __call__(self, module: torch.nn.Module, inputs: tuple) -> None:
        share(inputs[0], self.readers)


class FusedFeedForward:
    """Mixed into the class of a feed-forward: its GELU joins the second layer's quantizer."""

    _fusion: tuple[str, str, Callable]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return second(gelu(first(x)))."""
        first, second, run = self._fusion
        return run(self.get_submodule(second), self.get_submodule(first)(x))


def feed_forwards(
    layers: Mapping[str, torch.nn.Module], family: Family
) -> Iterator[tuple[str, FeedForward]]:
    """Yield (name, record) of each feed-forward whose second layer is among `layers`."""
    for record in family.feed_forwards:
        for name in layers:
            if name.endswith(f".{record.name}.{record.second}"):
                yield name.removesuffix(f".{record.second}"), record


def fused(plain: torch.nn.Module, record: FeedForward, run: Callable) -> torch.nn.Module:
    """Return a copy of a feed-forward, with the same children, whose GELU is left to `run`.

    run(second, x): returns second(gelu(x)). Children that are replaced in one are replaced in both.
    """
    if isinstance(plain, FusedFeedForward):
        return plain
    copy = object.__new__(_fused_class(type(plain)))
    copy.__dict__ = dict(plain.__dict__)
    copy.__dict__["_fusion"] = (record.first, record.second, run)
    return copy


@functools.cache
def _fused_class(kind: type) -> type:
    return type(f"Fused{kind.__name__}", (FusedFeedForward, kind), {})
