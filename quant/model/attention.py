"""`set_attention`: the router of `ops.attention` behind the attention of diffusers' models.

diffusers 0.37 and later have each attention processor name a backend, by which
`models.attention_dispatch` finds the function that computes. Here each mode of the router is
registered there as one more backend, and copies of the processors name it. The names are members
of diffusers' enumeration in type alone: the enumeration itself stays as it is.
"""

import copy
import functools
import logging
from collections.abc import Iterator

import torch
from torch import nn

from ...ops.attention import router
from ...ops.attention.blocks import LAYERS, parse_blocks
from .names import names_of

logger = logging.getLogger(__name__)

BACKEND = "_attention_backend"
_said: set[str] = set()


class AttentionSetting:
    """What `set_attention` did. names: of the attentions that it changed. Undone at most once."""

    def __init__(self, changed: list[tuple[str, nn.Module, object, object]]):
        self._changed = changed
        self.names = tuple(name for name, *_ in changed)

    def undo(self) -> None:
        """Put the original processors back; a second call does nothing.

        Raises RuntimeError, before anything changes, when a processor was replaced again since.
        """
        for name, module, _, made in self._changed:
            if module.processor is not made:
                raise RuntimeError(f"{name}: its processor was replaced again; undo that first")
        for _, module, original, _ in self._changed:
            module.set_processor(original)
        self._changed = []

    def __enter__(self) -> "AttentionSetting":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def set_attention(
    model: nn.Module,
    mode: str = "auto",
    *,
    layers: str = "all",
    blocks: str = "",
    rotate: bool = False,
) -> AttentionSetting:
    """Compute the attention of a diffusers `model` by `mode`, in place; return what can undo it.

    mode: of the router, `ops.attention.router.NAMES`. layers: `self`, where Qwen-Image's attention
    of text and image together belongs; `cross`; or `all`. blocks: "0-2, 5, 38-", numbers in the
    model's stack of blocks; "" for all. rotate: `lowbit_*` modes multiply q and k by a Hadamard
    matrix before they round them, which is more exact where a few channels are much larger than the
    others, and a little slower. A call that the mode does not take, such as a head size
    too large, goes to the backend that was there, which a warning says once; so do, without one,
    those for which `auto` knows nothing better.
    Raises ValueError for unknown words, for a mode that cannot rotate, and when the model has no
    such attention; NoBackendError when the mode can run nothing on the model's device, or GPU.
    """
    if layers not in LAYERS:
        raise ValueError(f"unknown layers {layers!r}; known are {', '.join(LAYERS)}")
    ranges = parse_blocks(blocks)
    if rotate:
        router.check_rotation(mode)
    router.check_runs(mode, running_device(next(model.parameters()).device))
    found = list(_attentions(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention processors that name a backend, as those "
            "of diffusers 0.37 and later do"
        )
    changed = []
    for name, module, block in found:
        kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
        within = ranges is None or (block is not None and any(block in r for r in ranges))
        if within and layers in (kind, "all"):
            made = _processor(module.processor, mode, rotate)
            changed.append((name, module, module.processor, made))
    if not changed:
        raise ValueError(f"the model has no attention of layers {layers!r} and blocks {blocks!r}")
    for _, module, _, made in changed:
        module.set_processor(made)
    return AttentionSetting(changed)


def running_device(device: torch.device | str) -> torch.device:
    """Return where a model that lies on `device` is likely to run: a GPU, where there is one."""
    device = torch.device(device)
    waits = device.type in ("cpu", "meta") and torch.cuda.is_available()
    # With its number, by which what is known of a GPU is kept.
    unsaid = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if waits or unsaid else device


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, int | None]]:
    """Yield (name, module, number of its block or None) of each attention that has a backend."""
    names = names_of(model)
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, BACKEND) and hasattr(module, "set_processor"):
            yield name, module, names.block(name)


def _processor(original, mode: str, rotate: bool):
    """Return a copy of a processor that names our backend for `mode`."""
    made = copy.copy(original)
    mode = router.ALIASES.get(mode, mode)
    kind = _class_of(type(original), mode, rotate, getattr(original, BACKEND))
    # Of the class: what a deep copy of the model copies are an object's own attributes.
    vars(made).pop(BACKEND, None)
    made.__class__ = kind
    return made


@functools.cache
def _class_of(kind: type, mode: str, rotate: bool, previous) -> type:
    return type(f"LowBit{kind.__name__}", (kind,), {BACKEND: _backend(mode, rotate, previous)})


@functools.cache
def _backend(mode: str, rotate: bool, previous):
    """Return the name under which diffusers finds our function, of diffusers' own type for it.

    previous: the name of the backend that takes what the mode leaves; None: whichever is active.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    parts = ("lowbit", mode, "rotated" if rotate else "", previous.value if previous else "")
    name = ".".join(filter(None, parts))
    member = str.__new__(AttentionBackendName, name)
    member._name_ = member._value_ = name
    _AttentionBackendRegistry.register(member)(_function(mode, rotate, previous))
    return member


def _function(mode: str, rotate: bool, previous):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    def lowbit_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config=None,
    ) -> torch.Tensor:
        """Return attention, [B, Lq, H, D]; query, key, value: [B, L, H, D], any strides.

        attn_mask: as the router has it, or of keys alone, [B, Lk].
        """
        mask = _four_dimensional(attn_mask, query, key)
        given = tuple(x.transpose(1, 2) for x in (query, key, value))
        if (
            not dropout_p
            and _parallel_config is None
            and _runs(mode, given, mask, is_causal, rotate)
        ):
            options = {"mask": mask, "causal": is_causal, "scale": scale, "rotate": rotate}
            return router.route(*given, mode, **options).transpose(1, 2)
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return dispatch_attention_fn(
            *(query, key, value, attn_mask),
            **options,
            enable_gqa=enable_gqa,
            backend=previous,
            parallel_config=_parallel_config,
        )

    return lowbit_attention


def _four_dimensional(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor):
    """Return a mask of diffusers, which may be of keys alone, as the router takes it."""
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dim() == 2 and tuple(mask.shape) == (query.shape[0], key.shape[1]):
        return mask[:, None, None, :]
    return mask.unsqueeze(1) if mask.dim() == 3 else mask


def _runs(mode: str, given, mask, causal: bool, rotate: bool) -> bool:
    way = router.choose(*given, mode, mask, causal, rotate=rotate)
    if mode == "auto" and way == router.SDPA:
        return False
    reason = router.refusal(way, *given, mask, causal)
    if reason:
        _say(f"left to diffusers' own backend: {reason}")
    return reason is None


def _say(text: str) -> None:
    """Warn, once for each text."""
    # torch.compile does not know how to log.
    if not torch.compiler.is_compiling() and text not in _said:
        _said.add(text)
        logger.warning("LowBit attention: %s", text)
