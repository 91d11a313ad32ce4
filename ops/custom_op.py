"""Operations that torch knows by name, so that torch.compile takes each as one step of its graph.

`torch.library.custom_op` does the same at two to three times the cost per call, which is felt
between kernels of 50 µs.
"""

from collections.abc import Callable

import torch

NAMESPACE = "lowbit"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def custom_op(signature: str, run: Callable, fake: Callable) -> Callable:
    """Return the operation `lowbit::<signature>`, which calls `run`.

    signature: torch's schema, "name(Tensor x, ...) -> Tensor". fake: gives empty results of the
    right shape and dtype. A second copy of the pack in one process shares the first one's.
    """
    name = signature.partition("(")[0]
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _LIBRARY.define(signature)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
