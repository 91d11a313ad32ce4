"""Operations that torch knows by name, so that torch.compile takes each as one step of its graph.

`torch.library.custom_op` does the same at two to three times the cost per call, which is felt
between kernels of 50 µs. A call that nobody watches goes straight to the function.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

NAMESPACE = "lowbit"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def custom_op(signature: str, run: Callable, fake: Callable) -> Callable:
    """Return a function that calls the operation `lowbit::<signature>`, or `run` itself.

    signature: torch's schema, "name(Tensor x, ...) -> Tensor", a tensor first; it is called with
    its arguments in order, of the schema's types, those with a default left out or not. fake:
    gives empty results of the right shape and dtype. A second copy of the pack in one process
    shares the first one's operation.
    """
    name = signature.partition("(")[0]
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _LIBRARY.define(signature)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    operation = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*arguments):
        if not watched(arguments[0]):
            return run(*arguments)
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        return operation(*arguments)

    return call


def _refuse_tangents(name: str, arguments: tuple) -> None:
    """Raise NotImplementedError where an argument has a tangent, which torch would drop."""
    tensors = (given for given in arguments if isinstance(given, torch.Tensor))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{NAMESPACE}::{name} has no derivative, forward AD included")


def watched(x: torch.Tensor) -> bool:
    """Return whether anybody else has to know of a call whose first argument is x.

    That is autograd, also forwards, tensors that are none of memory, and whatever follows
    operations: modes of torch's dispatcher, fake tensors and export among them, transforms of
    torch.func, torch.jit.
    """
    # torch.compile follows this one alone.
    if torch.compiler.is_compiling():
        return True
    return (
        type(x) is not torch.Tensor
        or torch.is_grad_enabled()
        # Tangents are carried without gradients too.
        or forward_ad._current_level >= 0
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
    )
