"""What is wrong with the set of names of a checkpoint, looked at as a whole."""

import re
from collections.abc import Iterator

from . import families
from .families.base import Shapes
from .inspect_problems import Finding

SHARD = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")


def check_names(
    path: str, model: families.Recognised, shapes: Shapes, quantized: bool
) -> Iterator[Finding]:
    """Yield what is missing from a model or cannot stay as it is.

    shapes: by name as in the file. quantized: it has such layers.
    """
    refused = model.family.refused and model.family.refused(model.renamed.values())
    if refused and quantized:
        yield Finding("fused_layers", "", refused)
    shard = SHARD.search(path)
    if shard and int(shard[1]) > 1:
        yield Finding("incomplete", "", f"this is one of {int(shard[1])} shards")
    if model.family.fallback:
        yield from _without_matrices(model, shapes)
    else:
        yield from _gaps(model)


def _without_matrices(model: families.Recognised, shapes: Shapes) -> Iterator[Finding]:
    """Yield that no block has a weight of two dimensions, of a model whose layers are not known."""
    inside = [(k, n) for k, n in model.renamed.items() if model.family.block_number(n) is not None]
    matrices = [k for k, n in inside if n.endswith(".weight") and len(shapes[k]) > 1]
    if model.blocks > 1 and not matrices:
        names = sorted({n.rpartition(".")[2] for _, n in inside})
        detail = f"no block has a matrix called weight; its tensors are called {', '.join(names)}"
        yield Finding("incomplete", "", detail)


def _gaps(model: families.Recognised) -> Iterator[Finding]:
    """Yield the weights that a block lacks and another, or every model of the family, has."""
    blocks: dict[str, set[str]] = {}
    for name in model.renamed.values():
        place = model.family.stack.match(name)
        index, _, rest = name[place.end() :].partition(".") if place else ("", "", "")
        if index.isdigit():
            blocks.setdefault(f"{place[0]}{index}.", set()).add(rest)
    everywhere = {f"{layer.name}.weight" for size in model.family.shapes.values() for layer in size}
    others = {n for names in blocks.values() for n in names if n.endswith((".weight", ".bias"))}
    for block, names in blocks.items():
        for name in sorted((others | everywhere) - names):
            detail = f"{block}{name} is missing"
            layer = name.rpartition(".")[0] + "."
            instead = sorted(n.removeprefix(layer) for n in names if n.startswith(layer))
            if name in others:
                detail += ", other blocks have it"
            elif instead:
                detail += f"; what is there is called {', '.join(instead)}"
            yield Finding("incomplete", block + name, detail)
