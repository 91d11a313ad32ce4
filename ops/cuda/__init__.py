"""CUDA C++ of this pack: compiled by torch's NVRTC, with nothing for a user to build or install."""

from pathlib import Path

FOLDER = Path(__file__).parent
