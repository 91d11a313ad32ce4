"""What the layers of a block have in common: an input that several read, a GELU between two.

Nothing here changes a class or another's module: layers are announced by hooks on modules of our
own, and a feed-forward is replaced by a copy that has the same children.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch

from ..ops.linear import release, share
from .families.base import Family, FeedForward

HOOK = "lowbit_shared_input"


def readers(
    layers: Mapping[str, torch.nn.Module], family: Family
) -> Iterator[list[torch.nn.Module]]:
    """Yield the layers, two or more, that read the same tensor. layers: by the host's names."""
    for group in family.shared_inputs:
        for name in layers:
            if not name.endswith(f".{group[0]}"):
                continue
            block = name.removesuffix(group[0])
            found = [layers[block + part] for part in group if block + part in layers]
            if len(found) > 1:
                yield found


def share_inputs(layers: Mapping[str, torch.nn.Module], family: Family) -> None:
    """Let layers that read the same tensor quantize it once, by a hook on each.

    layers: by name, all of our own.
    """
    for group in readers(layers, family):
        for layer in group:
            _hook(layer, _announcer(len(group)))


def _hook(layer: torch.nn.Module, before: Callable) -> None:
    # torch numbers hooks through, and torch.compile would compile every block for its numbers:
    # these have one name in all.
    layer._forward_pre_hooks[HOOK] = before
    layer._forward_pre_hooks_with_kwargs[HOOK] = True
    layer._forward_hooks[HOOK] = _end
    layer._forward_hooks_with_kwargs[HOOK] = True
    layer._forward_hooks_always_called[HOOK] = True


def share_as(layer: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let `other` share its input as `layer` does, if it does."""
    if HOOK in layer._forward_pre_hooks:
        _hook(other, layer._forward_pre_hooks[HOOK])


@functools.cache
def _announcer(readers: int) -> Callable:
    return functools.partial(_announce, readers)


def _announce(readers: int, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    share(args[0] if args else kwargs["input"], readers)


def _end(module: torch.nn.Module, args: tuple, kwargs: dict, output) -> None:
    release(args[0] if args else kwargs["input"])


class Fused:
    """Mixed into the class of a module that joins steps of it; `_fusion`: by what."""

    _fusion: object


class FusedFeedForward(Fused):
    """Mixed into the class of a feed-forward: its GELU joins the second layer's quantizer."""

    _fusion: tuple[str, str, Callable]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return second(gelu(first(x)))."""
        first, second, run = self._fusion
        return run(self.get_submodule(second), self.get_submodule(first)(x))


def feed_forwards(
    layers: Mapping[str, torch.nn.Module], family: Family
) -> Iterator[tuple[str, FeedForward]]:
    """Yield (name, record) of each feed-forward whose second layer is among `layers`."""
    for record in family.feed_forwards:
        for name in layers:
            if name.endswith(f".{record.name}.{record.second}"):
                yield name.removesuffix(f".{record.second}"), record


def fused(
    plain: torch.nn.Module, record: FeedForward, run: Callable, lent: bool = False
) -> torch.nn.Module:
    """Return a copy of a feed-forward, with the same children, whose GELU is left to `run`.

    run(second, x): returns second(gelu(x)). Children that are replaced in one are replaced in both.
    lent: whether a `forward` that it has of its own is taken off before the copy runs.
    Returns `plain` itself where it is such a copy, or has another activation.
    """
    activations = [m.approximate for m in plain.modules() if hasattr(m, "approximate")]
    if isinstance(plain, Fused) or activations != ["tanh"]:
        return plain
    if not lent and not has_own_forward(plain):
        return plain
    return copied(plain, FusedFeedForward, (record.first, record.second, run))


def moved(other: Fused, plain: torch.nn.Module) -> torch.nn.Module:
    """Return `plain` fused as `other` is; itself where it is fused already."""
    mixin = type(other).__bases__[0]
    return plain if isinstance(plain, Fused) else copied(plain, mixin, other._fusion)


def copied(plain: torch.nn.Module, mixin: type[Fused], fusion: object) -> torch.nn.Module:
    """Return a copy of a module, with the same children, with `mixin` before its class.

    A `forward` of the module's own, put there by others, is left behind.
    """
    copy = object.__new__(_fused_class(mixin, type(plain)))
    copy.__dict__ = {name: value for name, value in vars(plain).items() if name != "forward"}
    copy.__dict__["_fusion"] = fusion
    return copy


def has_own_forward(module: torch.nn.Module) -> bool:
    """Return whether a module's `forward` is that of its class; others assign to it."""
    assigned = vars(module).get("forward")
    # ComfyUI gives back what it replaced as an attribute: the method of the class, bound, or that
    # of a copy, where another node had patched the copy's.
    of = getattr(assigned, "__self__", None)
    own = getattr(assigned, "__func__", None) is type(module).forward
    return assigned is None or own or isinstance(of, Fused)


def forget_copy(module: torch.nn.Module) -> None:
    """Take the method of a copy off a module that ComfyUI has put it on."""
    if isinstance(getattr(vars(module).get("forward"), "__self__", None), Fused):
        del module.forward


@functools.cache
def _fused_class(mixin: type[Fused], kind: type) -> type:
    return type(f"Fused{kind.__name__}", (mixin, kind), {})
