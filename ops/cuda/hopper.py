"""What kernels of Hopper's own instructions have in common: where they run, how they compile."""

from pathlib import Path

import torch

from ..registry import capability
from . import FOLDER, nvrtc

HOPPER = (9, 0)
# NVRTC's options. What is compiled for sm_90a runs on no other GPU, newer ones included.
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "-default-device")


def source(*paths: Path) -> str:
    """Return the text of hopper.cu, which has Hopper's instructions, and after it that of paths."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (FOLDER / "hopper.cu", *paths))


def missing(device: torch.device) -> str | None:
    """Return why no such kernel can run on `device`, or None."""
    if device.type == "cuda" and capability(device) != HOPPER:
        return f"needs compute capability {HOPPER}, got {capability(device)}"
    return nvrtc.missing()
