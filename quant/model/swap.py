"""Modules put in the place of others, to be undone; no `forward` is assigned to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Place:
    """Where a module is held: `parent._modules[attribute]`, which is called `name`."""

    parent: nn.Module
    attribute: str
    name: str

    @property
    def module(self) -> nn.Module | None:
        return self.parent._modules.get(self.attribute)


def places(model: nn.Module, kind: type[nn.Module]) -> Iterator[list[Place]]:
    """Yield the places of each module of `kind` below `model`: several where it is shared."""
    found: dict[int, list[Place]] = {}
    for path, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, kind):
                name = f"{path}.{attribute}" if path else attribute
                found.setdefault(id(child), []).append(Place(parent, attribute, name))
    yield from found.values()


def place(model: nn.Module, name: str) -> Place:
    """Return the place of the module called `name` below `model`."""
    path, _, attribute = name.rpartition(".")
    return Place(model.get_submodule(path), attribute, name)


class Swap:
    """Modules that stand for others. It alone holds the others: dropping it frees them."""

    def __init__(self):
        self._done: list[tuple[Place, nn.Module, nn.Module]] = []

    def put(self, where: Iterable[Place], module: nn.Module) -> None:
        """Put `module` into all the places of another."""
        for spot in where:
            self._done.append((spot, spot.module, module))
            spot.parent._modules[spot.attribute] = module

    def undo(self) -> None:
        """Put the original modules back, on the device and in the mode of what stood for them.

        A second call does nothing. Raises RuntimeError, before anything changes, when yet another
        module has taken a place.
        """
        for spot, _, module in self._done:
            if spot.module is not module:
                raise RuntimeError(f"{spot.name} was replaced again since; undo that first")
        for spot, original, module in reversed(self._done):
            if isinstance(original, nn.Linear):
                original.train(module.training).to(module.weight.device)
            spot.parent._modules[spot.attribute] = original
        self._done = []
