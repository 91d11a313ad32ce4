"""How other programs lay out quantized layers, one file each.

Every module here with `NAMES`, what `--from` takes, and `read(RawLayer) -> list[Reading]` is one.
"""

import functools
import importlib
import pkgutil
from types import ModuleType

import torch

from .base import BOTH, RawLayer, Reading
from .order import ORDERS, Found, OrderError, by_kind, find_orders

__all__ = [
    "BOTH",
    "ORDERS",
    "Found",
    "OrderError",
    "RawLayer",
    "Reading",
    "by_kind",
    "find_orders",
    "names",
    "readings",
]


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    return tuple(m for m in modules if hasattr(m, "NAMES"))


def names() -> tuple[str, ...]:
    """Return what `--from` takes."""
    return tuple(name for module in _modules() for name in module.NAMES)


def readings(layer: RawLayer, source: str | None = None) -> list[Reading]:
    """Return the ways in which a layer can be read; source: only as this dialect.

    None where numbers with a sign are marked as MXFP8: they are no codes, its format refuses them.
    """
    if layer.parts["weight"].dtype == torch.int8 and layer.marker.get("format") == "mxfp8":
        return []
    asked = [m for m in _modules() if source in (None, *m.NAMES)]
    found = [reading for module in asked for reading in module.read(layer)]
    return [r for r in found if source in (None, r.dialect)]
