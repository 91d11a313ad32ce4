"""How precisely `attention` computes: one record a mode."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mode:
    """A mode is named for its P·V; Q·Kᵀ is INT8 in all, with the mean key taken off.

    code: the kernels' number for it. storage: of V; None reads V as it came. limit: largest
    magnitude stored. max_error: relative L2 error at most on normally distributed Q, K and V
    against float64, as the proof of each kernel. capability: the least that has the instructions.
    """

    name: str
    code: int
    storage: torch.dtype | None
    limit: float
    max_error: float
    capability: tuple[int, int]


MODES = {
    mode.name: mode
    for mode in (
        Mode("exact", 0, None, 0.0, 0.015, (8, 0)),
        Mode("fp8", 1, torch.float8_e4m3fn, 448.0, 0.04, (8, 9)),
        Mode("int8", 2, torch.int8, 127.0, 0.02, (8, 0)),
    )
}
