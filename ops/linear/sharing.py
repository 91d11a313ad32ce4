"""One quantization of an activation that several linear layers read, q, k and v among them.

Whoever knows that the same tensor goes to several layers, unchanged between them, says so with
`share` before each of them and `release` after it; the first layer leaves what it made of it on the
tensor, and after the last one it is taken away.
"""

from collections.abc import Callable, Hashable

import torch

from .activation import QuantizedActivation, version

ATTRIBUTE = "_lowbit_shared"


class Shared:
    """The quantized forms of one tensor, for as many readers as are still to come."""

    def __init__(self, readers: int, version: int | None):
        self.readers = readers
        self.version = version
        self.forms: dict[Hashable, QuantizedActivation | torch.Tensor] = {}


def share(x: torch.Tensor, readers: int) -> None:
    """Announce that `readers` linear layers read x, and that nobody writes to it in between.

    A second announcement while readers are left changes nothing. When torch.compile is at work
    nothing is kept, and torch's own compiler does not join equal steps of ours: whoever compiles
    gives layers one `QuantizedActivation` to share.
    """
    if torch.compiler.is_compiling() or readers < 2 or type(x) is not torch.Tensor:
        return
    shared = getattr(x, ATTRIBUTE, None)
    if shared is None or shared.version != version(x):
        setattr(x, ATTRIBUTE, Shared(readers, version(x)))


def release(x: torch.Tensor) -> None:
    """Say that a reader of x has ended, whichever way it took; the last one's end drops the forms.

    A reader may take a way that quantizes nothing, as one with a LoRA in its weight does.
    """
    shared = None if torch.compiler.is_compiling() else getattr(x, ATTRIBUTE, None)
    if shared is None:
        return
    shared.readers -= 1
    if shared.readers <= 0:
        delattr(x, ATTRIBUTE)


def quantized_once(
    x: torch.Tensor, kind: Hashable, quantize: Callable[[], QuantizedActivation | torch.Tensor]
) -> QuantizedActivation | torch.Tensor:
    """Return `quantize()`, or what it returned to an earlier reader of a shared x.

    kind: what is made of x, a `Kind` or any other name for it.
    """
    shared = None if torch.compiler.is_compiling() else getattr(x, ATTRIBUTE, None)
    if shared is None or shared.version != version(x):
        return quantize()
    if kind not in shared.forms:
        shared.forms[kind] = quantize()
    return shared.forms[kind]
