"""Kernels of CUDA C++ for `ops.launch`: compiled when first launched, then started by one call.

Such a kernel has one parameter, a struct: packed in one step, it costs the host about what Triton's
launcher does.
"""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence

import torch

from ..registry import capability
from . import nvrtc

_Parameters = ctypes.c_char_p * 1


def address(x: torch.Tensor | int | None) -> int:
    """Return where a tensor starts; an address is itself, None is 0."""
    if x is None:
        return 0
    return x if type(x) is int else x.data_ptr()


class CudaKernel:
    """A kernel as `ops.launch` takes it, in place of one of Triton's."""

    def __init__(self, name: str, pointers: int, layout: str, source: Callable[[], str]):
        """name: of the function. source: gives the text.

        pointers, layout: of its parameter, so many pointers and then what `struct` takes.
        """
        # By this `ops.launch` tells kernels apart.
        self.fn = self
        self._name = name
        self._pointers = pointers
        self._layout = layout
        self._source = source

    def load(
        self,
        device: torch.device,
        threads: int,
        shared_bytes: int,
        defined: Sequence[tuple[str, int]],
    ) -> "Loaded":
        """Compile for `device`, the current one, and load; defined: names set in the source.

        threads: of a block. shared_bytes: its dynamic shared memory.
        """
        code = nvrtc.machine_code(self._source(), options(capability(device), defined))
        loaded = Loaded(code, self._name, shared_bytes)
        loaded.prepare(self._pointers, self._layout, threads, device.index)
        return loaded


def options(capability: tuple[int, int], defined: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Return NVRTC's options: a product and a sum are rounded each, unless the source says fma."""
    major, minor = capability
    names = (f"-D{name}={value}" for name, value in defined)
    target = f"--gpu-architecture=sm_{major}{minor}"
    return (target, "--std=c++17", "-default-device", "--fmad=false", *names)


@functools.cache
def _cu_launch_kernel() -> Callable:
    """Return cuLaunchKernel with its types."""
    number, pointer = ctypes.c_uint, ctypes.c_void_p
    types = (pointer, *(number,) * 7, pointer, pointer, pointer)
    return ctypes.CFUNCTYPE(ctypes.c_int, *types)(("cuLaunchKernel", nvrtc.driver()))


class Loaded(nvrtc.Kernel):
    """A `CudaKernel` on the current device."""

    # `start` takes addresses in place of tensors that `ops.replay` makes, and the kernel begins
    # when the one before it has ended.
    by_address = True

    def prepare(self, pointers: int, layout: str, threads: int, device: int) -> None:
        """Set what all launches have in common."""
        self._pointers = pointers
        self._pack = struct.Struct(f"{pointers}P{layout}").pack
        # After the number of blocks, as cuLaunchKernel takes them.
        self._sizes = (1, 1, threads, 1, 1, self._shared_bytes)
        self._device = device

    def start(self, programs: int, arguments: Sequence) -> None:
        """Run so many blocks on the current stream.

        arguments: what `address` takes for the pointers, then the other fields. Raises NvrtcError.
        """
        n = self._pointers
        parameters = _Parameters(self._pack(*map(address, arguments[:n]), *arguments[n:]))
        # As `torch.cuda.current_stream` finds it, without an object for it.
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        launch, rest = _cu_launch_kernel(), (*self._sizes, stream, parameters, None)
        result = launch(self._function, programs, *rest)
        if result == nvrtc.NO_CONTEXT:
            nvrtc.enter(self._device)
            result = launch(self._function, programs, *rest)
        if result:
            nvrtc.check(result, "cuLaunchKernel")
