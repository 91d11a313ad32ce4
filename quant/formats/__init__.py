"""Number formats, one file each; every module here with a `FORMAT` is one."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from comfy_kitchen.tensor import QuantizedTensor

from .base import Format, NotFiniteError, flat_marker

__all__ = ["Format", "NotFiniteError", "from_marker", "get", "names", "of"]


@functools.cache
def _formats() -> dict[str, Format]:
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    found = [m.FORMAT for m in modules if hasattr(m, "FORMAT")]
    # Eight bits first, then four; within that by name.
    return {f.name: f for f in sorted(found, key=lambda f: (f.bits < 8, f.name))}


def names() -> tuple[str, ...]:
    """Return the names of all formats, 8-bit ones first."""
    return tuple(_formats())


def get(name: str) -> Format:
    """Return the format called `name`. Raises ValueError that lists the known ones."""
    if name not in _formats():
        raise ValueError(f"unknown format {name!r}; known are {', '.join(names())}")
    return _formats()[name]


def from_marker(marker: Mapping[str, Any]) -> Format:
    """Return the format that a layer's `comfy_quant` marker names.

    Raises ValueError when no format here has that name on disk.
    """
    options = flat_marker(marker)
    for fmt in _formats().values():
        same_name = fmt.marker["format"] == options.get("format")
        if same_name and bool(fmt.marker.get("convrot")) == bool(options.get("convrot")):
            return fmt
    raise ValueError(f"unknown format {marker.get('format')!r} in comfy_quant")


def of(weight: QuantizedTensor) -> Format:
    """Return the format of a quantized weight of ours. Raises ValueError for other layouts."""
    for fmt in _formats().values():
        # A weight may have a layout of its own that extends the format's: `with_arithmetic`.
        if issubclass(weight.layout_cls, fmt.layout):
            return fmt
    raise ValueError(f"layout {weight._layout_cls} is not one of this pack's formats")
