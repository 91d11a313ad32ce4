"""Launching Triton kernels at a third of the usual cost on the host.

Triton looks at every argument of every call to find the compiled kernel that fits. Here the caller
says what the code depends on, and the compiled kernel is called directly.
"""

import contextlib
from collections.abc import Hashable

import torch

# Triton compiles another kernel for a pointer that is aligned to this many bytes.
ALIGNMENT = 16
_compiled: dict[Hashable, object] = {}


def alignment(*tensors: torch.Tensor | None) -> tuple[bool | None, ...]:
    """Return, for each tensor, whether its start is aligned; None for None."""
    return tuple(None if t is None else t.data_ptr() % ALIGNMENT == 0 for t in tensors)


def launch(
    kernel,
    programs: int,
    arguments: tuple,
    options: dict[str, int],
    key: Hashable,
    device: torch.device,
) -> None:
    """Run `kernel` with `programs` programs on `device`.

    arguments: all of them, constants included, in the order of the signature. key: everything
    about them that changes the compiled code: dtypes, constants, alignments, absent ones. options:
    of Triton's compiler, num_warps among them.
    """
    grid = (programs, 1, 1)
    key = (kernel, device.index, key, *options.values())
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = kernel[grid](*arguments, **options)
        else:
            compiled[grid](*arguments)
