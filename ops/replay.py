"""Calls that are prepared once: what a function launches, again for other tensors of their kind.

To cut a product, to name what a kernel's code depends on and to list its forty arguments takes
longer than to launch it, and all of it follows from dtypes, shapes, strides and alignments. Nothing
of a call is kept but these: neither tensors nor their addresses.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from . import launch as launching
from . import tuning

# Of what is between two kernels, as torch aligns it; and what is larger stays apart: calls of such
# sizes do not wait for the host, and their pieces are found more easily than one for all.
BETWEEN_ALIGNMENT, MOST_BETWEEN = 512, 32 << 20
# Bits of an address that tell whether it is aligned.
MISALIGNED = launching.ALIGNMENT - 1
_here = threading.local()
_UNKNOWN = object()


def facts(arguments: Iterable) -> tuple:
    """Return what is to be known of arguments but the values in tensors, as a key.

    Of tensors, tuples of them included: dtype, shape, strides, alignment and device. Of numbers:
    the type too.
    """
    known = []
    for given in arguments:
        if isinstance(given, torch.Tensor):
            aligned = not given.data_ptr() & MISALIGNED
            known += (given.dtype, given.shape, given.stride(), aligned, given.device)
            continue
        kind = type(given)
        if kind is tuple:
            given = facts(given)
        # As text: 1, 1.0 and True are equal, and so are 0.0 and -0.0.
        elif kind is float:
            given = given.hex()
        elif kind is bool:
            given = "True" if given else "False"
        known.append(given)
    return tuple(known)


class _Record:
    """What a call did. made: by `empty`. launches: arguments of `launch`, and its result."""

    def __init__(self):
        self.made: list[torch.Tensor] = []
        self.launches: list[tuple] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an empty tensor that a `replayed` function makes: a result, or between two kernels."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    record = getattr(_here, "record", None)
    if record is not None:
        record.made.append(tensor)
    return tensor


def launch(*arguments) -> None:
    """Launch a kernel as `launch.launch` does, from within a `replayed` function or not."""
    compiled = launching.launch(*arguments)
    record = getattr(_here, "record", None)
    if record is not None:
        record.launches.append((arguments, compiled))


class Plans:
    """Calls of one function that are prepared once and from then on only launched.

    The function may do nothing but make tensors by `empty`, launch kernels by `launch` and return
    tensors of these or of its arguments, one, or a tuple of them and None. All of that has to
    follow from the `facts` of its arguments and from the entries of `tuning`. A call that launches
    with a tensor of any other origin, such as a copy of an argument, is prepared each time, and so
    is one that launches nothing. A call from within another such one becomes part of it.
    """

    def __init__(self):
        # None: a call of this kind is prepared each time.
        self._plans: dict[tuple, _Plan | None] = {}
        # How often they were forgotten.
        self._age = 0
        tuning.when_forgotten(self._forget)

    def run(self, arguments: tuple, function: Callable):
        """Return function(), or what it would, by the launches of a call like it.

        arguments: all that it depends on; one that holds tensors is a tensor or a tuple of them.
        """
        if getattr(_here, "record", None) is not None:
            return function()
        key, flat = facts(arguments), _flat(arguments)
        plan = self._plans.get(key, _UNKNOWN)
        if plan is None:
            return function()
        if plan is not _UNKNOWN:
            return plan.run(flat)
        _here.record = record = _Record()
        began = self._age
        try:
            result = function()
        finally:
            _here.record = None
        tensors = [given for given in flat if isinstance(given, torch.Tensor)]
        # Of one tensor in two places nothing is learnt about two tensors; and what was prepared by
        # entries that were forgotten meanwhile is out of date.
        if self._age == began and len({id(given) for given in tensors}) == len(tensors):
            if len(self._plans) >= tuning.REMEMBERED:
                self._plans.clear()
            self._plans[key] = _planned(record, flat, result)
        return result

    def _forget(self) -> None:
        self._age += 1
        self._plans.clear()


def replayed(function: Callable) -> Callable:
    """Return `function`, which is as `Plans` describes it, so that calls of it are prepared once.

    Arguments are given by position.
    """
    plans = Plans()

    @functools.wraps(function)
    def call(*arguments):
        return plans.run(arguments, lambda: function(*arguments))

    return call


def _flat(arguments: tuple) -> list:
    """Return arguments with those of tuples in their place."""
    flat = []
    for given in arguments:
        if type(given) is tuple:
            flat += given
        else:
            flat.append(given)
    return flat


class _Plan:
    """A call without its tensors: what is made, what is launched, and what comes back.

    Tensors are known by their place among the arguments, and what is made after these.
    """

    def __init__(
        self,
        made: list[tuple | int],
        size: int,
        launches: list[tuple],
        results: int | tuple[int | None, ...],
    ):
        """made: shape, dtype and device of a tensor, or its place in memory of `size` bytes.

        What has a place is known by its address, which the launches take in place of a tensor.
        """
        self._made = made
        self._size = size
        self._launches = launches
        self._results = results

    def run(self, tensors: list) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Launch for `tensors`, the arguments, and return what the function would."""
        start = 0
        if self._size:
            # Held until the last launch.
            memory = torch.empty(self._size, dtype=torch.uint8, device=self._launches[0][1][-1])
            start = memory.data_ptr()
        for made in self._made:
            if type(made) is int:
                tensors.append(start + made)
                continue
            shape, dtype, device = made
            tensors.append(torch.empty(shape, dtype=dtype, device=device))
        for compiled, (kernel, programs, template, *rest, device), places in self._launches:
            arguments = template.copy()
            for place, source, descriptor in places:
                tensor = tensors[source]
                arguments[place] = tensor if descriptor is None else _like(descriptor, tensor)
            if compiled is None:
                launching.launch(kernel, programs, tuple(arguments), *rest, device)
            else:
                launching.again(compiled, programs, arguments, device)
        if type(self._results) is int:
            return tensors[self._results]
        return tuple([None if source is None else tensors[source] for source in self._results])


def _planned(record: _Record, flat: list, result) -> _Plan | None:
    """Return how to do again what a call did; None where it launched with tensors of others."""
    flat = [*flat, *record.made]
    source = {id(x): index for index, x in enumerate(flat) if isinstance(x, torch.Tensor)}
    launches = []
    for (kernel, programs, arguments, *rest), compiled in record.launches:
        template, places = list(arguments), []
        for place, given in enumerate(arguments):
            tensor = getattr(given, "base", None) if _is_descriptor(given) else given
            if not isinstance(tensor, torch.Tensor):
                continue
            if id(tensor) not in source:
                return None
            descriptor = None if tensor is given else (type(given), {**vars(given), "base": None})
            template[place] = None
            places.append((place, source[id(tensor)], descriptor))
        launches.append((compiled, (kernel, programs, template, *rest), places))
    single = isinstance(result, torch.Tensor)
    results = (result,) if single else result
    if not launches or any(x is not None and id(x) not in source for x in results):
        return None
    returned = tuple([None if x is None else source[id(x)] for x in results])
    made, size = [(tuple(x.shape), x.dtype, x.device) for x in record.made], 0
    # Kernels that take addresses need no tensors for what is between them.
    if all(getattr(compiled, "by_address", False) for compiled, *_ in launches):
        first = len(flat) - len(made)
        between = [i for i in range(len(made)) if first + i not in returned]
        used = [{place[1] for place in places} for *_, places in launches]
        spans = {i: _Span.of(record.made[i], first + i, used) for i in between}
        starts, size = packed({i: x for i, x in spans.items() if x.size <= MOST_BETWEEN})
        made = [starts.get(i, kind) for i, kind in enumerate(made)]
    return _Plan(made, size, launches, returned[0] if single else returned)


class _Span(NamedTuple):
    """Bytes of a tensor, and the first and the last launch that it is used by."""

    size: int
    first: int
    last: int

    @classmethod
    def of(cls, x: torch.Tensor, source: int, used: list[set[int]]) -> "_Span":
        """Return that of a tensor known by its source; used: the sources of each launch."""
        by = [i for i, sources in enumerate(used) if source in sources]
        return cls(x.numel() * x.element_size(), by[0], by[-1]) if by else cls(0, 0, 0)


def packed(spans: dict[int, _Span]) -> tuple[dict[int, int], int]:
    """Return where each is to stand, and the bytes of all: side by side only where both are used.

    The largest first, each as far to the front as there is room.
    """
    starts: dict[int, int] = {}
    for i in sorted(spans, key=lambda i: -spans[i].size):
        size, first, last = spans[i]
        taken = sorted(
            (starts[j], starts[j] + spans[j].size)
            for j in starts
            if spans[j].first <= last and first <= spans[j].last
        )
        start = 0
        for begin, end in taken:
            if start + size <= begin:
                break
            start = max(start, -(-end // BETWEEN_ALIGNMENT) * BETWEEN_ALIGNMENT)
        starts[i] = start
    return starts, max((starts[i] + spans[i].size for i in starts), default=0)


def _is_descriptor(given) -> bool:
    """Return whether an argument is Triton's description of a tensor for TMA."""
    return hasattr(given, "block_shape")


def _like(descriptor: tuple[type, dict], tensor: torch.Tensor):
    """Return a description of a tensor like that of another with the same facts.

    Triton's own way checks again what the facts say already.
    """
    kind, fields = descriptor
    made = object.__new__(kind)
    made.__dict__.update(fields)
    made.base = tensor
    return made
