"""Attention of a model of WanVideoWrapper by our router, on a model of its own.

That pack's attention layers call a function `attention` of their module, with the name of a mode
that each layer has as an attribute. The clone's layers get classes below theirs, whose methods are
that pack's own code with another `attention` in scope; and a hook on the clone's transformer names,
before each step, the layers that are meant. What the router does not take goes to that pack's
function, in the mode that the layer had.
Source: kijai/ComfyUI-WanVideoWrapper 1.4.6, wanvideo/modules/model.py and attention.py.
"""

import functools
import inspect
import itertools
from dataclasses import dataclass, field
from types import FunctionType

import torch

from ..ops.attention import router, ways
from ..ops.attention.blocks import parse_blocks
from . import wanvideo_model
from .attention_override import IMAGE_CROSS, Call, Override
from .wanvideo_model import TRANSFORMER

# The name under which that pack's layers look for their attention.
FUNCTION = "attention"
LAYERS = {"self_attn": "self", "cross_attn": "cross"}
# Arguments of that function that change the result in ways the router does not know, with the
# values under which they do not.
PLAIN = {
    "softmax_scale": None,
    "q_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "dropout_p": 0.0,
}
SEPARATOR = ":"
FEW_BITS, OUTER_STEPS = 4, 0.1
_keys = itertools.count()


@dataclass(eq=False)
class Routing:
    """The layers of one clone that go to the router, named so in the steps that are meant.

    key: what the mode of such a layer begins with. steps: from the first part of the sampling, 0 to
    1, to before the second. is_first: of several in a row. places: the layers, and their blocks.
    """

    key: str
    steps: tuple[float, float]
    is_first: bool
    places: list[torch.nn.Module] = field(default_factory=list)

    def __call__(self, transformer, args: tuple, kwargs: dict) -> None:
        """Name the layers in a step that begins; a hook on the transformer."""
        start, end = self.steps
        share = kwargs.get("current_step_percentage", 0.0)
        active = start <= share < end or start < end == 1.0 <= share
        for place in self.places:
            mode = place.attention_mode
            # The first of several hooks begins with the layer's own mode.
            mode = mode.rpartition(SEPARATOR)[2] if self.is_first else mode
            place.attention_mode = self.key + mode if active else mode


def _attend(key: str, rules: Override, plain, q, k, v, *args, attention_mode="sdpa", **kwargs):
    """Return attention as `plain`, that pack's function, would: [B, L, H, D], contiguous.

    q, k, v: [B, L, H, D]. attention_mode: of the layer, after `key` where it is meant.
    """
    if not attention_mode.startswith(key):
        return plain(q, k, v, *args, attention_mode=attention_mode, **kwargs)
    call = None if args else _read_call(q, k, v, kwargs)
    if call is None or not rules.runs(call):
        own = attention_mode.removeprefix(key)
        return plain(q, k, v, *args, attention_mode=own, **kwargs)
    return rules.attend(call).transpose(1, 2).contiguous()


def _read_call(q, k, v, options: dict) -> Call | None:
    """Return the call of that pack's attention, None where it asks for what the router has not."""
    if any(options.get(name, plain) != plain for name, plain in PLAIN.items()):
        return None
    q, k, v = (x.transpose(1, 2) for x in (q, k.to(q.dtype), v.to(q.dtype)))
    mask = options.get("attn_mask")
    if mask is not None and mask.dim() not in (2, 4):
        return None
    return Call(q, k, v, mask, None, joined=False)


def set_attention(patcher, rules: Override):
    """Return a clone of a WANVIDEOMODEL that computes attention by our router, as `rules` say.

    A mode of 4 bits leaves out a tenth of the steps at either end. Raises what
    `wanvideo_model.check` raises, ValueError for layers that are not apart in that pack or a
    version of it whose attention is elsewhere, NoBackendError when the mode can run nothing on the
    model's GPU, or CPU.
    """
    wanvideo_model.check(patcher)
    layers, steps = rules.layers, rules.steps
    if layers == IMAGE_CROSS:
        raise ValueError(
            "WanVideo: attention to the image is part of the layers that attend to the text; "
            "choose layers cross"
        )
    if ways.bits(rules.mode) == FEW_BITS:
        margin = OUTER_STEPS * (steps[1] - steps[0])
        steps = (steps[0] + margin, steps[1] - margin)
    router.check_runs(rules.mode, patcher.load_device)
    clone = wanvideo_model.clone(patcher)
    transformer = getattr(clone.model, TRANSFORMER)
    hooks = transformer._forward_pre_hooks.values()
    is_first = not any(isinstance(hook, Routing) for hook in hooks)
    routing = Routing(f"lowbit{next(_keys)}{SEPARATOR}", steps, is_first)
    ranges = parse_blocks(rules.blocks)
    # One class for all layers of a kind: torch.compile would take others for other programs.
    routed_class = functools.cache(
        functools.partial(_routed_class, attend=functools.partial(_attend, routing.key, rules))
    )
    for index, block in wanvideo_model.blocks(transformer):
        if ranges is None or any(index in r for r in ranges):
            routing.places += _route_block(block, layers, routed_class)
    transformer.register_forward_pre_hook(routing, with_kwargs=True)
    return clone


def _route_block(block: torch.nn.Module, layers: str, routed_class) -> list[torch.nn.Module]:
    """Replace the attention layers of a block that are meant; return whose mode tells that."""
    places = []
    for name, kind in LAYERS.items():
        layer = getattr(block, name, None)
        if layer is None or layers not in (kind, "all"):
            continue
        routed = object.__new__(routed_class(type(layer)))
        routed.__dict__ = layer.__dict__
        block._modules[name] = routed
        # A block's own mode says whether its self-attention is sparse.
        places += [routed, block] if kind == "self" else [routed]
    return places


def _routed_class(kind: type, attend) -> type:
    """Return a class below `kind` whose methods find `attend` where they look for attention."""
    methods = {}
    for name in dir(kind):
        method = inspect.getattr_static(kind, name)
        if isinstance(method, FunctionType) and _calls_attention(method):
            methods[name] = _rescoped(method, attend)
    if not methods:
        raise ValueError(
            "WanVideo: this version of WanVideoWrapper computes attention elsewhere: "
            f"{kind.__name__} calls no function {FUNCTION}"
        )
    return type(kind.__name__, (kind,), methods)


def _calls_attention(method: FunctionType) -> bool:
    return FUNCTION in method.__code__.co_names and FUNCTION in method.__globals__


def _rescoped(method: FunctionType, attend) -> FunctionType:
    """Return a method with the same code, in whose scope attention is `attend`."""
    scope = dict(method.__globals__)
    scope[FUNCTION] = functools.partial(attend, scope[FUNCTION])
    # torch.compile would look names up in the module that this names.
    scope.pop("__name__", None)
    new = FunctionType(
        method.__code__, scope, method.__name__, method.__defaults__, method.__closure__
    )
    new.__kwdefaults__ = method.__kwdefaults__
    return new
