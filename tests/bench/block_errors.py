"""Relative errors of weights in block-scaled formats, ours and comfy-kitchen's, as a table.

`python -m tests.bench.block_errors` prints what docs/results/block_scales.md holds.
"""

import torch

from lowbit.quant import formats
from tests.block_data import KINDS, NAMES, made, others

SHAPE = (512, 5120)


def table() -> str:
    """Return a Markdown table: kinds of data by formats, each cell ours / comfy-kitchen's."""
    rows = [["weight", *(f"`{name}`" for name in NAMES)], ["---"] * (1 + len(NAMES))]
    for kind in KINDS:
        weight = made(kind, SHAPE)
        rows.append([kind, *(_cell(name, weight) for name in NAMES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(name: str, weight: torch.Tensor) -> str:
    ours = formats.get(name).quantize(weight).dequantize()
    return " / ".join(f"{_error(values, weight):.4f}" for values in (ours, others(name, weight)))


def _error(values: torch.Tensor, weight: torch.Tensor) -> float:
    return ((values.double() - weight.double()).norm() / weight.double().norm()).item()


if __name__ == "__main__":
    print(table())
