"""What this pack writes about a model into its file: the record in the metadata.

JSON under one key: versions, format, recipe, and for every linear layer its format and error, or
why it was kept.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import formats
from .checkpoint.header import CheckpointError, parse_json

# The pack's version; pyproject.toml has the same, a test compares them.
VERSION = "0.1.0"
RECORD_KEY = "_lowbit"
RECORD_VERSION = 1


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer.

    error: relative L2 error of the weight against the source, None where it was kept or copied, or
    where a patch has been merged since.
    """

    name: str
    format: str | None
    shape: tuple[int, ...]
    size_bytes: int
    error: float | None = None
    reason: str = ""


def encode(records: Sequence[LayerRecord], **about: str) -> str:
    """Return the record of `records` as JSON; about: further entries, such as the recipe."""
    layers, kept = {}, {}
    for record in records:
        if record.format is None:
            kept[record.name] = record.reason
            continue
        layers[record.name] = entry = {"format": record.format}
        if record.error is not None:
            entry["error"] = float(f"{record.error:.4g}")
        if record.reason:
            entry["reason"] = record.reason
        if formats.get(record.format).pad_multiple > 1:
            entry["shape"] = list(record.shape)
    versions = {
        "lowbit": VERSION,
        "torch": torch.__version__,
        "comfy-kitchen": importlib.metadata.version("comfy-kitchen"),
    }
    record = {"version": RECORD_VERSION, **about, "versions": versions}
    return json.dumps({**record, "layers": layers, "kept": kept})


def decode(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the layers of the record in a file's metadata by name; none without a good record.

    An `error` that is no finite number is left out.
    """
    try:
        layers = parse_json(metadata.get(RECORD_KEY, "{}"), RECORD_KEY).get("layers", {})
        entries = {name: entry for name, entry in layers.items() if isinstance(entry, dict)}
    except (CheckpointError, AttributeError):
        return {}
    return {
        name: {k: v for k, v in entry.items() if k != "error" or _is_finite(v)}
        for name, entry in entries.items()
    }


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)
