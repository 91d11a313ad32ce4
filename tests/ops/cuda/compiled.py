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

# Of fields that a kernel's parameters may have.
TYPES = "unsigned char|char|float|void|long long|int|u32"


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


def fields_of(source: str, struct: str) -> list[str]:
    """Names of a struct's fields in CUDA C++, in their order; of a struct in it, its type as well.

    ctypes and C lay out the same fields the same way.
    """
    found = re.search(rf"struct {struct} \{{(.*?)\}};", source, re.S).group(1)
    fields = []
    for declaration in re.sub(r"//[^\n]*", "", found).split(";"):
        names = re.sub(rf"^\s*(const )?({TYPES})\b", "", declaration).split(",")
        fields += [name.strip(" *\n") for name in names if name.strip()]
    return fields
