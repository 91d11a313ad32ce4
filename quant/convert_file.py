"""Bringing a quantized checkpoint to the host's names, words and order, its numbers as they are."""

import os

import torch

from .checkpoint.foreign import Request
from .convert import plan_as_stored
from .quantize_file import Progress, Result, open_source, write

# For numbers that no format holds: the most exact in 8 bits.
FALLBACK = "int8_convrot"


def convert_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dialect: str | None = None,
    order: str | None = None,
    format_name: str = FALLBACK,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Write `source` to `target` as ComfyUI has it, bit for bit where a format holds its numbers.

    dialect: whose layout it is, of `dialects.names`; None: what the file itself shows. order: of
    its block scales, of `dialects.ORDERS`; None likewise. format_name: for layers whose scales no
    format has, which are quantized again. Raises CheckpointError when the file can be read in
    several ways, and what `quantize_file` raises; `target` is then absent or as it was.
    """
    checkpoint = open_source(source, target, overwrite)
    work = plan_as_stored(checkpoint, Request(dialect, order), format_name)
    return write(work, target, device, progress)
