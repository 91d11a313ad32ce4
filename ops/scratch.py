"""What the next layer needs, prepared on a side stream while this layer multiplies.

Scratch itself is torch's: an operation allocates what it decodes to and lets go of it when it ends,
so that all layers, and all models, use the same memory in turn, it is returned with the rest, and
CUDA graphs and torch.compile see nothing but ordinary memory. At most two buffers are alive: this
layer's, and the next one's.

Which layer is next is learnt: the one that followed last time. It is known by its stored weight, as
an object: one that is streamed in anew for every call is never the same, and so never prepared. The
first layer of a pass is not prepared either, for weights may be written to between passes.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

# Of the tensor that stands for a layer: what is known of it goes with it.
ATTRIBUTE = "_lowbit_ahead"
Tensors = tuple[torch.Tensor, ...]
# What prepares a layer: a function of the tensors that are its weight.
Prepare = Callable[..., Tensors]


@dataclass(eq=False)
class _Layer:
    """A layer: weak references to its tensors, what to do with them, and which one follows.

    last_pass: when it was seen last. first: it begins a pass.
    """

    sources: tuple[weakref.ref | None, ...] = ()
    prepare: Prepare | None = None
    form: Hashable = None
    last_pass: int = 0
    first: bool = False
    next: weakref.ref | None = None

    def __reduce__(self):
        """Make None of a copy: one of the tensor is another layer."""
        return type(None), ()

    def alive(self) -> tuple[torch.Tensor | None, ...] | None:
        """Return the tensors, None where one is gone."""
        found = tuple(None if ref is None else ref() for ref in self.sources)
        pairs = zip(found, self.sources, strict=True)
        return None if any(t is None and ref is not None for t, ref in pairs) else found


class Ahead:
    """The order of the layers on one device, and what is prepared of the next one.

    side: what runs a function beside the present work.
    """

    def __init__(self, side: "Side"):
        self._side = side
        self._pass = 0
        # References to layers, which their tensors hold.
        self._last: weakref.ref | None = None
        self._ready: tuple[weakref.ref, Tensors] | None = None

    def take(
        self, sources: tuple[torch.Tensor | None, ...], form: Hashable, prepare: Prepare
    ) -> Tensors:
        """Return `prepare(*sources)`, done already where this layer was foreseen in this form.

        The first of `sources` stands for the layer. form, prepare: hold no tensor.
        """
        layer = self._learn(sources, form, prepare)
        ready, self._ready = self._ready, None
        if ready is None or ready[0]() is not layer:
            return prepare(*sources)
        return self._side.join(ready[1])

    def _learn(self, sources, form: Hashable, prepare: Prepare) -> _Layer:
        layer = getattr(sources[0], ATTRIBUTE, None)
        if layer is None:
            layer = _Layer()
            setattr(sources[0], ATTRIBUTE, layer)
        known = layer.alive() or ()
        same = len(known) == len(sources) and all(map(operator.is_, known, sources))
        if layer.form != form or not same:
            layer.sources = tuple(None if s is None else weakref.ref(s) for s in sources)
            layer.prepare, layer.form = prepare, form
            # What may be prepared is of other tensors.
            self._ready = None
        last = self._last() if self._last else None
        if layer.last_pass == self._pass or last is None:
            # A layer that comes again begins a pass.
            self._pass += 1
            layer.first = True
        layer.last_pass = self._pass
        self._last = weakref.ref(layer)
        if last is not None:
            last.next = self._last
        return layer

    def begin(self) -> None:
        """Say that what is prepared next may begin when the work until now has ended."""
        self._side.begin()

    def go_on(self) -> None:
        """Prepare the layer that followed the one taken last, unless it begins a pass."""
        last = self._last() if self._last else None
        layer = last.next() if last is not None and last.next else None
        sources = None if layer is None or layer.first else layer.alive()
        if sources is None:
            return
        owner = weakref.ref(layer, self._drop)
        self._ready = (owner, self._side.run(lambda: layer.prepare(*sources)))

    def _drop(self, owner: weakref.ref) -> None:
        """Let go of what was prepared for a layer that is gone."""
        if self._ready is not None and self._ready[0] is owner:
            self._ready = None


class Side:
    """A side stream of a GPU."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._begun, self._done = torch.cuda.Event(), torch.cuda.Event()

    def begin(self) -> None:
        """Let what runs next begin after all that the present stream has been given until now.

        That is the weights' way to the GPU too.
        """
        self._begun.record()

    def run(self, prepare: Callable[[], Tensors]) -> Tensors:
        """Return what `prepare` gives, computed beside the present stream: not to be used yet."""
        self._stream.wait_event(self._begun)
        with torch.cuda.stream(self._stream):
            tensors = prepare()
        self._done.record(self._stream)
        return tensors

    def join(self, tensors: Tensors) -> Tensors:
        """Return the result of the last `run`, for the present stream to use."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        for tensor in tensors:
            # Their memory is the side stream's, not to be given away there while it is read here.
            tensor.record_stream(stream)
        return tensors


@functools.cache
def ahead(device: torch.device) -> Ahead:
    """Return what looks ahead on a GPU."""
    return Ahead(Side(device))


def can_look_ahead(device: torch.device) -> bool:
    """Return whether a side stream may be used now: on a GPU, no graph being made."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()
