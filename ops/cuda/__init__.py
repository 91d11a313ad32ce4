"""CUDA C++ of this pack: compiled by torch's NVRTC, with nothing for a user to build or install."""

from pathlib import Path

FOLDER = Path(__file__).parent
# NVRTC's options for Hopper's own instructions.
HOPPER_OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "-default-device")


def source(*paths: Path) -> str:
    """Return the text of hopper.cu, which has Hopper's instructions, and after it that of paths."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (FOLDER / "hopper.cu", *paths))
