"""CUDA C++ compiled and disassembled without a GPU, for tests of what the machine is told to do."""

import ctypes
import functools
import importlib.util
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from lowbit.ops.cuda import nvrtc


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC from the package nvidia-cuda-nvrtc, which torch's CUDA wheels bring along."""
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in spec.submodule_search_locations if spec else ():
            found = sorted(Path(folder, "lib").glob("libnvrtc*.so.*"))
            for path in (p for p in found if "builtins" in p.name and "alt" not in p.name):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            for path in (p for p in found if re.fullmatch(r"libnvrtc\.so\.\d+", p.name)):
                return ctypes.CDLL(str(path))
    return None


def compiled(source: str, options: Sequence[str]) -> bytes:
    """Machine code of CUDA C++, or the log in an NvrtcError; skips where NVRTC is missing."""
    found = library()
    if found is None:
        pytest.skip("the package nvidia-cuda-nvrtc is missing")
    return nvrtc.compile_source(source, options, found)


def disassembled(code: bytes, tmp_path: Path) -> tuple[str, str]:
    """(SASS, resource usage) by the tools that Triton brings."""
    triton = pytest.importorskip("triton", reason="Triton, which has the disassembler, is missing")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = tmp_path / "kernel.cubin"
    path.write_bytes(code)
    return tuple(
        subprocess.run([*command, path], capture_output=True, text=True, check=True).stdout
        for command in ([tools / "nvdisasm"], [tools / "cuobjdump", "--dump-resource-usage"])
    )
