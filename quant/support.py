"""Which backend runs each format on each generation of GPU, as the registry's data say."""

from ..ops import registry
from ..ops.linear import OP
from . import formats
from .formats import Format

# Generations by compute capability; None is the CPU.
GENERATIONS = {
    "CPU": None,
    "Turing 7.5": (7, 5),
    "Ampere 8.0, 8.6": (8, 0),
    "Ada 8.9": (8, 9),
    "Hopper 9.0": (9, 0),
    "Blackwell 10.0, 12.0": (10, 0),
}


def table() -> str:
    """Return a Markdown table: formats by generations, each cell the backend that `auto` takes."""
    rows = [["format", "bits", "stock ComfyUI", *GENERATIONS]]
    rows.append(["---"] * len(rows[0]))
    for name in formats.names():
        fmt = formats.get(name)
        native = "loads it" if fmt.native else "needs this pack"
        cells = [_backend(fmt, capability) for capability in GENERATIONS.values()]
        rows.append([f"`{name}`", f"{fmt.bits:g}", native, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _backend(fmt: Format, capability: tuple[int, int] | None) -> str:
    for backend in registry.backends(OP):
        if _fits(backend.needs, fmt.layout.scheme, capability):
            return backend.name
    return "-"


def _fits(needs: registry.Needs, scheme: str, capability: tuple[int, int] | None) -> bool:
    device = "cuda" if capability else "cpu"
    # The table is of many tokens.
    if needs.few:
        return False
    if scheme not in needs.schemes or (needs.devices and device not in needs.devices):
        return False
    if capability is None:
        return True
    if needs.capability and capability < needs.capability:
        return False
    return needs.measured is None or needs.measured[0] <= capability < needs.measured[1]
