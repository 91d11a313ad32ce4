"""The CUDA C++ source of the Hopper kernel: compiled by NVRTC where it is installed."""

import ctypes
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

from lowbit.ops.attention import hopper, nvrtc
from lowbit.ops.attention.modes import MODES

SHARED_KIB = 227
# The tensor-core instructions of Q·Kᵀ and of P·V in SASS, and how many of each a tile takes.
INSTRUCTIONS = {"exact": ("IGMMA", "HGMMA"), "fp8": ("IGMMA", "QGMMA"), "int8": ("IGMMA", "IGMMA")}


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


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_uses_wgmma_and_no_local_memory(mode, dtype, tmp_path):
    nvrtc_library = library()
    if nvrtc_library is None:
        pytest.skip("the package nvidia-cuda-nvrtc is missing")
    code = nvrtc.compile_source(hopper.source(), hopper.options(mode, dtype), nvrtc_library)
    sass, usage = disassembled(code, tmp_path)
    assert re.search(r"STACK:0\b.*LOCAL:0\b", usage)
    for instruction in INSTRUCTIONS[mode.name]:
        assert re.search(rf"\b{instruction}\.64x128", sass)
    assert re.search(r"IGMMA\.64x128x32\.U8\.S8", sass) or mode.name != "int8"


def test_source_that_is_wrong_gives_the_compilers_log():
    nvrtc_library = library()
    if nvrtc_library is None:
        pytest.skip("the package nvidia-cuda-nvrtc is missing")
    with pytest.raises(nvrtc.NvrtcError, match="undefined"):
        nvrtc.compile_source("int x = y;", (), nvrtc_library)


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
def test_shared_memory_suffices(mode):
    # The barriers and scales are apart, within a KiB.
    assert hopper.shared_bytes(mode) + 1024 <= SHARED_KIB * 1024


def test_parameters_are_laid_out_as_in_the_source():
    """Names and order of `struct Params`: ctypes and C lay out the same fields the same way."""
    struct = re.search(r"struct Params \{(.*?)\};", hopper.source(), re.S).group(1)
    struct = re.sub(r"//[^\n]*", "", struct)
    fields = [
        name.strip(" *")
        for declaration in struct.split(";")
        for name in re.sub(
            r"^\s*(const )?(char|float|void|long long|int)\b", "", declaration
        ).split(",")
        if name.strip()
    ]
    assert fields == [name for name, _ in hopper.Params._fields_]


def test_map_is_aligned():
    assert ctypes.addressof(hopper._aligned_map()) % hopper.MAP_ALIGNMENT == 0


def test_v_that_a_map_cannot_describe_is_copied():
    v = torch.zeros(1, 2, 9, 128, dtype=torch.float16)
    for good in (v, v.transpose(1, 2).contiguous().transpose(1, 2)):
        assert hopper._readable(good) is good
    for bad in (
        torch.zeros(1, 2, 9, 256, dtype=torch.float16)[..., ::2],
        torch.zeros(1, 2, 9, 129, dtype=torch.float16)[..., 1:],
        v[:, :1].expand(1, 4, 9, 128),
    ):
        assert hopper._readable(bad).is_contiguous()
