"""What a checkpoint is and what is wrong with it, from its header, its markings and its scales.

Payloads are not read, so that a file of 14 GB takes seconds. Not detectable from a file alone: the
order of two nibbles in a byte (names and the order of the scales tell whose it is, see `dialects`),
a rotation that a marker does not tell of, and scales in a wrong order that have no pattern of rows
and columns (see `scale_order`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from . import families, formats
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.foreign import AmbiguousError
from .checkpoint.stored import MARKER, StoredLayer, stored_layers
from .inspect_layers import (
    KNOWN_SCALES,
    Layer,
    check,
    check_finite,
    check_order,
    dtype_name,
    find_layers,
)
from .inspect_names import check_names
from .inspect_problems import PACK, Finding, Problem, group

BITS = 8


@dataclass(frozen=True)
class Group:
    """Linear layers of one format, or of one plain dtype. size_bytes: with their scales."""

    count: int
    size_bytes: int
    elements: int


@dataclass(frozen=True)
class Report:
    """What `inspect_file` found.

    formats: name of a format, or of a dtype for linear layers that are not quantized → layers.
    outside: tensors that belong to another model in the file. bits_quantized: per weight of the
    quantized layers, scales included; None without any. bits: per parameter of the whole file.
    """

    path: str
    size_bytes: int
    tensors: int
    outside: int
    family: str
    title: str
    variant: str
    prefix: str
    blocks: int
    formats: Mapping[str, Group]
    bits_quantized: float | None
    bits: float
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(p for p in self.problems if p.affects)


def inspect_file(path: str) -> Report:
    """Return what the checkpoint at `path` is and what is wrong with it.

    Raises CheckpointError when the file is truncated, corrupt or no checkpoint.
    """
    checkpoint = open_checkpoint(path)
    findings: list[Finding] = []
    layers = find_layers(checkpoint, findings)
    for layer in layers.values():
        findings.extend(check(checkpoint, layer))
    findings.extend(check_order(checkpoint, layers))
    stored = _stored(checkpoint, findings)
    findings = _settle_foreign(layers, stored, findings)
    for layer in layers.values():
        findings.extend(check_finite(checkpoint, layer))
    shapes = _logical_shapes(checkpoint, layers, stored)
    model = _recognise(shapes, findings)
    findings.extend(check_names(checkpoint.path, model, shapes, bool(layers)))
    groups, bits_quantized, bits = _sizes(checkpoint, layers, shapes, model)
    return Report(
        path=checkpoint.path,
        size_bytes=checkpoint.size_bytes,
        tensors=len(checkpoint),
        outside=len(checkpoint) - len(model.renamed),
        family=model.family.name,
        title=model.family.title,
        variant=model.variant,
        prefix=model.prefix,
        blocks=model.blocks,
        formats=groups,
        bits_quantized=bits_quantized,
        bits=bits,
        problems=group(findings),
    )


def _stored(checkpoint: Checkpoint, findings: list[Finding]) -> dict[str, StoredLayer]:
    """Return the layers as this pack reads them; when it refuses, say why unless it is said."""
    try:
        return stored_layers(checkpoint)
    except AmbiguousError as error:
        findings.append(Finding("ambiguous_layout", "", str(error)))
        return {}
    except ValueError as error:
        if not any(PACK in f.who for f in findings):
            findings.append(Finding("refused", "", str(error)))
        return {}


def _settle_foreign(
    layers: dict[str, Layer], stored: dict[str, StoredLayer], findings: list[Finding]
) -> list[Finding]:
    """Return findings without this pack where it reads a layer in another program's layout."""
    foreign = {name: layer for name, layer in stored.items() if layer.reading}
    for name, layer in foreign.items():
        layers[name].format = layer.format
        detail = f"it is as {layer.marked_by} writes it"
        if layer.marked_by in formats.names():
            detail = f"it is {layer.marked_by} that is not marked"
        findings.append(Finding("foreign_layout", name, detail))
    return [
        replace(f, affects=tuple(who for who in f.who if who != PACK)) if f.layer in foreign else f
        for f in findings
    ]


def _logical_shapes(checkpoint, layers: dict[str, Layer], stored) -> dict[str, tuple[int, ...]]:
    """Return shapes by tensor name; of quantized weights, what they have once dequantized."""
    shapes = {name: info.shape for name, info in checkpoint.items()}
    for layer in layers.values():
        key = layer.parts.get("weight")
        if layer.format and key and len(shapes[key]) == 2:
            n, k = shapes[key]
            known = stored[layer.name].shape if layer.name in stored else None
            shapes[key] = known or (n, k * layer.format.packed)
    return shapes


def _recognise(shapes, findings: list[Finding]) -> families.Recognised:
    try:
        model = families.recognise(shapes)
    except ValueError as error:
        findings.append(Finding("unsupported_layout", "", str(error)))
        fallback = families.get(families.names()[-1])
        return families.Recognised(fallback, "unknown", "", 0, {name: name for name in shapes})
    renamed = [k for k, v in model.renamed.items() if k != model.prefix + v]
    if renamed:
        detail = f"{renamed[0]} is {model.renamed[renamed[0]]} to ComfyUI"
        findings.append(Finding("diffusers_names", "", detail))
    if model.prefix != model.host_prefix:
        findings.append(Finding("unknown_prefix", "", f"the names begin with {model.prefix}"))
    return model


def _sizes(checkpoint, layers, shapes, model) -> tuple[dict[str, Group], float | None, float]:
    """Return the groups of linear layers, bits per weight of the quantized, bits of the whole."""
    sums: dict[str, list[int]] = {}
    beside = set()
    for layer in layers.values():
        known = set(layer.format.scales.values()) if layer.format else set()
        beside |= {t for p, t in layer.parts.items() if p in known | KNOWN_SCALES | {MARKER}}
    for key, info in checkpoint.items():
        module, _, part = key.rpartition(".")
        if part != "weight" or len(info.shape) != 2 or key not in model.renamed:
            continue
        layer = layers.get(module)
        fmt = layer.format if layer else None
        parts = [layer.parts[p] for p in fmt.scales.values() if p in layer.parts] if fmt else []
        size = info.size_bytes + sum(checkpoint[p].size_bytes for p in parts)
        plain = info.encoding or dtype_name(info.dtype)
        total = sums.setdefault(fmt.name if fmt else plain, [0, 0, 0])
        for i, value in enumerate((1, size, math.prod(shapes[key]))):
            total[i] += value
    groups = {name: Group(*total) for name, total in sums.items()}
    quantized = [g for name, g in groups.items() if name in formats.names()]
    elements = sum(math.prod(shape) for key, shape in shapes.items() if key not in beside)
    return groups, _bits(quantized), checkpoint.size_bytes * BITS / max(elements, 1)


def _bits(groups: list[Group]) -> float | None:
    elements = sum(g.elements for g in groups)
    return sum(g.size_bytes for g in groups) * BITS / elements if elements else None
