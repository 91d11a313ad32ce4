"""What a recorded function may do to tensors: anything else is missing when it is replayed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lowbit.ops import custom_op, launch, replay


class OnlyLaunches(TorchDispatchMode):
    """Refuses what computes with a tensor of `replay.empty`, and what writes to an argument."""

    def __init__(self, arguments: tuple):
        super().__init__()
        # By memory, that views count too; of an empty tensor there is none.
        self._given = {_memory(x) for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        record = replay._here.record
        made = {_memory(x) for x in record.made} - {0} if record else set()
        found = operation._schema.arguments
        for argument, given in [*zip(found, args, strict=False), *_named(found, kwargs or {})]:
            memory = {_memory(x) for x in tree_leaves(given) if isinstance(x, torch.Tensor)} - {0}
            written = argument.alias_info is not None and argument.alias_info.is_write
            # A view computes nothing.
            computed = memory & made and (written or argument.alias_info is None)
            assert not computed, f"{operation} of a tensor that replay.empty made"
            assert not (written and memory & self._given), f"{operation} writes to an argument"
        return operation(*args, **(kwargs or {}))


def _named(found, kwargs: dict):
    return [(argument, kwargs[argument.name]) for argument in found if argument.name in kwargs]


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextmanager
def only_launches() -> Iterator[list[int]]:
    """Have every function that `replay.Plans` records do nothing but make tensors and launch.

    Gives the list to which the number of launches of each is added. What kernels do is theirs.
    """
    run, first, counts = replay.Plans.run, launch.launch, []

    def watched(plans: replay.Plans, arguments: tuple, function: Callable):
        if getattr(replay._here, "record", None) is not None:
            return run(plans, arguments, function)

        def recorded():
            with OnlyLaunches(arguments):
                result = function()
            record = replay._here.record
            counts.append(len(record.launches) if record else 0)
            return result

        return run(plans, arguments, recorded)

    def launched(*arguments):
        with _disable_current_modes():
            return first(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.Plans, "run", watched)
        patch.setattr(launch, "launch", launched)
        # Else the operations within would be steps of the mode, which sees nothing inside them.
        patch.setattr(custom_op, "watched", lambda x: False)
        yield counts
