"""Launching kernels, Triton's at a third of the usual cost on the host.

Triton looks at every argument of every call to find the compiled kernel that fits. Here the caller
says what the code depends on, and the compiled kernel is called directly.
"""

import functools
from collections.abc import Hashable, Sequence

import torch

from .cuda.kernel import CudaKernel
from .cuda.nvrtc import Kernel
from .registry import capability

# The first Triton that tests compile the kernels with; 3.4 does not compile the scaled product.
TRITON_MIN = (3, 5)
# Triton compiles another kernel for a pointer that is aligned to this many bytes.
ALIGNMENT = 16
_compiled: dict[Hashable, object] = {}


def alignment(*tensors: torch.Tensor | None) -> tuple[bool | None, ...]:
    """Return, for each tensor, whether its start is aligned; None for None."""
    return tuple(None if t is None else t.data_ptr() % ALIGNMENT == 0 for t in tensors)


@functools.cache
def dependent(device: torch.device) -> dict[str, bool]:
    """Return the option of `launch` with which a kernel need not await the end of the one before.

    That kernel must wait itself (`gdc_wait`) before it touches memory. Empty where the GPU (before
    SM90) or Triton (before 3.5) has no such launch.
    """
    has = capability(device)
    if has is None or has < (9, 0) or torch.version.hip:
        return {}
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.language.extra import cuda

    known = "launch_pdl" in CUDAOptions.__dataclass_fields__ and hasattr(cuda, "gdc_wait")
    return {"launch_pdl": True} if known else {}


def launch(
    kernel,
    programs: int,
    arguments: tuple,
    options: dict[str, int | bool],
    key: Hashable,
    device: torch.device,
) -> object | None:
    """Run `kernel` with `programs` programs on `device`; return what `again` takes, if anything.

    arguments: all of them, constants included, in the order of the signature. key: everything
    about them that changes the compiled code: dtypes, constants, alignments, absent ones. options:
    of Triton's compiler, num_warps among them, or of `CudaKernel.load`.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, arguments, options, key, device)
    # The function itself: the hash of a kernel is Triton's, of its source.
    key = (kernel.fn, device.index, key, *options.values())
    compiled = _compiled.get(key)
    if compiled is None and isinstance(kernel, CudaKernel):
        compiled = _compiled[key] = kernel.load(device, **options)
        compiled.start(programs, arguments)
    elif compiled is None:
        # Triton's interpreter gives nothing.
        compiled = _compiled[key] = kernel[programs, 1, 1](*arguments, **options)
    else:
        _start(compiled, programs, arguments)
    return compiled


def again(compiled, programs: int, arguments: Sequence, device: torch.device) -> None:
    """Run on `device` what `launch` returned there; arguments: others of the same key."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return again(compiled, programs, arguments, device)
    _start(compiled, programs, arguments)


@functools.cache
def _triton():
    """Return Triton's holder of the active driver, and its settings while kernels run."""
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


def _start(compiled, programs: int, arguments: Sequence) -> None:
    """Run a compiled kernel on the current device and stream.

    As Triton's own `run` does it (triton/runtime/jit.py, alike in 3.5 to 3.9), but for hooks, such
    as those of its profiler: where nobody has any, none are called.
    """
    if isinstance(compiled, Kernel):
        compiled.start(programs, arguments)
        return
    driver, runtime = _triton()
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if getattr(enter, "calls", True) or getattr(leave, "calls", True):
        compiled[programs, 1, 1](*arguments)
        return
    active = driver.active
    stream = active.get_current_stream(active.get_current_device())
    handles = compiled.function, compiled.packed_metadata
    compiled.run(programs, 1, 1, stream, *handles, None, None, None, *arguments)
