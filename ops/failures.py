"""What a kernel raises that cannot run on a device."""

import functools
import importlib.util


@functools.cache
def failures() -> tuple[type[Exception], ...]:
    """Return what to catch where a kernel is tried: RuntimeError, and Triton's where that is there.

    Triton's own, of compilation, of shared memory and of ptxas, are no RuntimeErrors.
    """
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError
