"""CUDA C++ compiled by NVRTC, which comes with torch, and launched through the CUDA driver.

One kernel a module, its parameters as ctypes values.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch

from . import cache

WINDOWS = hasattr(ctypes, "WinDLL")
# CUfunction_attribute: most dynamic shared memory that a launch may ask for.
MAX_DYNAMIC_SHARED_BYTES = 8
# CUresult where no CUDA context is current on the thread.
NO_CONTEXT = 201
# CUlaunchAttributeID: the kernel may be set up while the one before it in the stream ends.
PROGRAMMATIC_STREAM_SERIALIZATION = 6


class NvrtcError(RuntimeError):
    """NVRTC or the CUDA driver refused; the message has its log or the name of its error."""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """Return NVRTC's library of the CUDA version that torch was built for.

    Raises NvrtcError when torch has no CUDA or the library cannot be loaded.
    """
    if torch.version.cuda is None:
        raise NvrtcError("torch was built without CUDA")
    major = torch.version.cuda.partition(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if WINDOWS else f"libnvrtc.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise NvrtcError(f"{name} cannot be loaded: {error}") from error


@functools.cache
def driver() -> ctypes.CDLL:
    """Return the CUDA driver's library. Raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if WINDOWS else "libcuda.so.1")


# torch.compile cannot trace how a library is loaded.
@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Return why kernels cannot be compiled here, or None."""
    try:
        _nvrtc()
        driver()
    except (NvrtcError, OSError) as error:
        return str(error)
    return None


def check(result: int, what: str) -> None:
    """Raise NvrtcError unless a call of the CUDA driver returned success."""
    if result:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {result}"
        raise NvrtcError(f"{what}: {reason}")


@functools.cache
def _version() -> str:
    """Return NVRTC's version, 13.0. Raises NvrtcError when it cannot be loaded or gives none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    if _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        raise NvrtcError("NVRTC told no version")
    return f"{major.value}.{minor.value}"


def machine_code(source: str, options: Sequence[str]) -> bytes:
    """Return the machine code of CUDA C++ `source`, compiled now or before, as `cache` keeps it.

    Raises NvrtcError with the compiler's log.
    """
    # By torch's own version its wheels choose NVRTC's patch, which NVRTC does not tell.
    versions = (_version(), torch.__version__, torch.version.cuda)
    return cache.kept((*versions, *options, source), lambda: compile_source(source, options))


def compile_source(
    source: str, options: Sequence[str], library: ctypes.CDLL | None = None
) -> bytes:
    """Return the machine code of CUDA C++ `source`, compiled now.

    library: NVRTC, where it is not torch's. Raises NvrtcError with the compiler's log.
    """
    nvrtc = library or _nvrtc()
    program = ctypes.c_void_p()
    reference = ctypes.byref(program)
    if nvrtc.nvrtcCreateProgram(reference, source.encode(), b"kernel.cu", 0, None, None):
        raise NvrtcError("NVRTC created no program")
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array):
            log = _bytes_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise NvrtcError(log.rstrip(b"\0").decode(errors="replace"))
        return _bytes_of(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(reference)


def _bytes_of(size_of, read, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def enter(device: int) -> None:
    """Make torch's context of a device current, on a thread that has called no CUDA function."""
    current = ctypes.c_void_p()
    check(driver().cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if current.value is not None:
        return
    number = ctypes.c_int()
    check(driver().cuDeviceGet(ctypes.byref(number), device), "cuDeviceGet")
    retained = driver().cuDevicePrimaryCtxRetain(ctypes.byref(current), number)
    check(retained, "cuDevicePrimaryCtxRetain")
    check(driver().cuCtxSetCurrent(current), "cuCtxSetCurrent")


def clear(address: int, words: int, stream: int) -> None:
    """Set so many words of 32 bits of the current device's memory to zero, on `stream`.

    At a third of what torch's own kernel for it costs the host. Raises NvrtcError.
    """
    given = ctypes.c_uint64(address), 0, ctypes.c_size_t(words), ctypes.c_void_p(stream)
    check(driver().cuMemsetD32Async(*given), "cuMemsetD32Async")


# CUlaunchConfig: blocks, threads, dynamic shared memory, stream, attributes and how many they are.
# Packed: with a ctypes.Structure, filled in for each launch, the host took 8 µs, so it takes 3.
_CONFIG = struct.Struct("7IPPI4x")
# CUlaunchAttribute: its number, and 64 bytes of its value, which is a number here.
_ATTRIBUTE = struct.Struct("i4xi60x")
_EARLY = ctypes.create_string_buffer(_ATTRIBUTE.pack(PROGRAMMATIC_STREAM_SERIALIZATION, 1))


class Kernel:
    """A compiled kernel, loaded on the current device."""

    def __init__(self, code: bytes, name: str, shared_bytes: int):
        """Load `name` of `code`; shared_bytes: the dynamic shared memory of every launch."""
        enter(torch.cuda.current_device())
        self._shared_bytes = shared_bytes
        self._module = ctypes.c_void_p()
        self._function = ctypes.c_void_p()
        check(driver().cuModuleLoadData(ctypes.byref(self._module), code), "cuModuleLoadData")
        check(
            driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()),
            f"cuModuleGetFunction {name}",
        )
        # Beside what the source itself declares, any may be too much without asking.
        if shared_bytes:
            check(
                driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes),
                f"cuFuncSetAttribute {shared_bytes} bytes of shared memory",
            )

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence,
        stream: int,
        early: bool = False,
    ) -> None:
        """Run on `stream`; arguments: ctypes values, in the order of the kernel's parameters.

        early: while the kernel before it ends, for which this one waits itself before it touches
        memory (`await_kernel_before` in hopper.cu).
        """
        pointers = struct.pack(f"{len(arguments)}P", *map(ctypes.addressof, arguments))
        attributes = ctypes.addressof(_EARLY) if early else 0
        sizes = (*grid, threads, 1, 1, self._shared_bytes)
        config = _CONFIG.pack(*sizes, stream, attributes, early)
        given = config, self._function, pointers, None
        result = driver().cuLaunchKernelEx(*given)
        if result == NO_CONTEXT:
            enter(torch.cuda.current_device())
            result = driver().cuLaunchKernelEx(*given)
        if result:
            check(result, "cuLaunchKernelEx")
