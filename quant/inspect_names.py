"""What is wrong with the set of names of a checkpoint, looked at as a whole."""

import re
from collections.abc import Iterator

from . import families
from .inspect_problems import Finding

SHARD = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")


def check_names(path: str, model: families.Recognised, quantized: bool) -> Iterator[Finding]:
    """Yield what is missing from a model or cannot stay as it is. quantized: it has such layers."""
    refused = model.family.refused and model.family.refused(model.renamed.values())
    if refused and quantized:
        yield Finding("fused_layers", "", refused)
    shard = SHARD.search(path)
    if shard and int(shard[1]) > 1:
        yield Finding("incomplete", "", f"this is one of {int(shard[1])} shards")
    for name in _gaps(model):
        yield Finding("incomplete", name, f"{name} is missing, other blocks have it")


def _gaps(model: families.Recognised) -> Iterator[str]:
    """Yield the weights that a block lacks and another has; blocks of known families are alike."""
    if model.family.fallback:
        return
    blocks: dict[str, set[str]] = {}
    for name in model.renamed.values():
        place = model.family.stack.match(name)
        index, _, rest = name[place.end() :].partition(".") if place else ("", "", "")
        if index.isdigit() and rest.endswith((".weight", ".bias")):
            blocks.setdefault(f"{place[0]}{index}.", set()).add(rest)
    everything = set().union(*blocks.values())
    for block, names in blocks.items():
        yield from sorted(block + name for name in everything - names)
