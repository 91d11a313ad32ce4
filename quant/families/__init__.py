"""The model families: one file each, found by looking into this folder.

A family's file defines FAMILY, a `base.Family`. Pure Python: names and shapes, no tensors.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .base import Decision, Family, LayerShape

__all__ = ["Decision", "Family", "LayerShape", "Recognised", "get", "names", "recognise"]

# Longest first: "model." is also the beginning of "model.diffusion_model.".
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.", "")
UNKNOWN_TO_HOST = {"diffusion_model."}


@dataclass(frozen=True)
class Recognised:
    """What a file holds.

    variant: the family's word for the model ("i2v"). prefix: what the model's keys begin with.
    blocks: transformer blocks in the main stack.
    renamed: key as in the file, prefix included -> the host's key, without prefix. Keys without
        the prefix belong to another model in the file (VAE, text encoder) and are not in it.
    """

    family: Family
    variant: str
    prefix: str
    blocks: int
    renamed: dict[str, str]

    @property
    def host_prefix(self) -> str:
        """The prefix under which the host finds the model: it takes most of PREFIXES."""
        return "" if self.prefix in UNKNOWN_TO_HOST else self.prefix

    def host_name(self, name: str) -> str:
        """The name of a layer or tensor of the file as the host has it, its prefix included."""
        if not name.startswith(self.prefix):
            return name
        bare = name.removeprefix(self.prefix)
        return self.host_prefix + self.family.rename([bare])[bare]


@cache
def _families() -> dict[str, Family]:
    """Every family by name, in alphabetical order, the fallback last."""
    modules = (
        importlib.import_module(f".{module.name}", __name__)
        for module in pkgutil.iter_modules(__path__)
    )
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    families.sort(key=lambda family: (family.fallback, family.name))
    return {family.name: family for family in families}


def names() -> tuple[str, ...]:
    """The families' names, the fallback last."""
    return tuple(_families())


def get(name: str) -> Family:
    """The family called `name`. Raises ValueError, with the names there are, for any other."""
    families = _families()
    if name not in families:
        raise ValueError(f"no model family {name!r}. Choose one of: {', '.join(families)}.")
    return families[name]


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Recognised:
    """The family, variant and host names of a file whose tensors have these shapes, by full key.

    A model that no family knows is of the fallback family.
    Raises ValueError for a file whose layout the host cannot load under any names.
    """
    *known, fallback = _families().values()
    for prefix in PREFIXES:
        keys = [key for key in shapes if key.startswith(prefix)]
        for family in known:
            found = _as_family(family, prefix, keys, shapes)
            if found is not None:
                _check_supported(found)
                return found
    counts = {
        prefix: fallback.count_blocks(
            key.removeprefix(prefix) for key in shapes if key.startswith(prefix)
        )
        for prefix in PREFIXES
    }
    prefix = max(PREFIXES, key=lambda prefix: (counts[prefix], prefix == ""))
    keys = [key for key in shapes if key.startswith(prefix)]
    found = _as_family(fallback, prefix, keys, shapes)
    assert found is not None, "the fallback family recognises everything"
    return found


def _as_family(
    family: Family, prefix: str, keys: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> Recognised | None:
    """`keys`, which begin with `prefix`, read as this family, or None if they are another's."""
    bare = family.rename(key.removeprefix(prefix) for key in keys)
    renamed = {key: bare[key.removeprefix(prefix)] for key in keys}
    variant = family.recognise({renamed[key]: shapes[key] for key in keys})
    if variant is None:
        return None
    return Recognised(family, variant, prefix, family.count_blocks(renamed.values()), renamed)


def _check_supported(found: Recognised) -> None:
    """Raise ValueError if the host cannot load this file under any names."""
    for rule in found.family.unsupported:
        for key in found.renamed:
            if rule.pattern.search(key):
                raise ValueError(f"{found.family.title} file with {key}: {rule.reason}")
