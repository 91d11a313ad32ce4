"""What ComfyUI calls instead of its own attention, without a need for ComfyUI.

The host calls an override with its own function first and that function's arguments after it. What
the router does not take, and what the user did not mean, goes to that function as it came.
"""

import itertools
import logging
import sys
from dataclasses import dataclass, field

import torch

from ..ops.attention import router, ways
from ..ops.attention.blocks import parse_blocks
from ..ops.attention.guard import FIRST_CALL, GUARDS
from ..ops.attention.prologue import NOTHING, Prologue

logger = logging.getLogger(__name__)

SELF, CROSS, IMAGE_CROSS, ALL = LAYERS = ("self", "cross", "image_cross", "all")
# What the host's functions take. A call with anything else is theirs.
POSITIONAL = ("heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
KNOWN = {
    *POSITIONAL,
    "scale",
    "enable_gqa",
    "low_precision_attention",
    "transformer_options",
    "_inside_attn_wrapper",
}
# The host's sigmas are float32 from a table, the limits float64 from a formula: a step that begins
# exactly at a limit belongs to what comes after it.
SAME_SIGMA = 1 + 1e-5
# Modes of 4 bits leave out one step of so many, rounded up, at either end. That the first and the
# last steps want more is SageAttention 3's advice; how many of them, nobody measured.
EDGE = 10
_keys = itertools.count()


@dataclass(frozen=True)
class Forward:
    """One run of the model. active: the step is meant. text, image: tokens of each, or None."""

    active: bool
    text: int | None
    image: int | None


@dataclass(frozen=True)
class Call:
    """One call of attention: q [B, H, Lq, D], k and v [B, Hkv, Lk, D], mask broadcast to 4-D.

    joined: the result is [B, Lq, H·D]. low: it may be computed in low precision.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    joined: bool
    low: bool = True


# The key of transformer options under which the host looks for an override.
OVERRIDE = "optimized_attention_override"
# The run of the model that each override is in, by its key. Compiled graphs ask here: the host's
# TorchCompileModel lets them forget to look at transformer options again.
_running: dict[str, Forward] = {}


def is_within(steps: tuple[float, float], sampling, sigmas: torch.Tensor | None) -> bool:
    """Return whether a step is within `steps`, parts of the sampling, by the host's order.

    There sigma falls. sampling: the model's `model_sampling`. sigmas: of the step; None: unknown,
    which is within all but an empty range.
    """
    start, end = steps
    if start == end or sigmas is None:
        return start < end
    if (start, end) == (0.0, 1.0):
        return True
    sigma = sigmas[0].item()
    before = start > 0 and sigma > sampling.percent_to_sigma(start) * SAME_SIGMA
    after = end < 1 and sigma <= sampling.percent_to_sigma(end) * SAME_SIGMA
    return not before and not after


def read_call(q, k, v, **options) -> Call | None:
    """Return the call of one of the host's attention functions, None where it is the host's alone.

    q, k, v: [B, L, H·D], with skip_reshape [B, H, L, D]; the result is [B, L, H·D], with
    skip_output_reshape [B, H, L, D]. mask: [L, L], [B, L, L] or [B, H, L, L], as the host reads it.
    """
    if options.keys() - KNOWN or options.get("attn_precision") is not None:
        return None
    gqa, heads = options.get("enable_gqa", False), options["heads"]
    if not options.get("skip_reshape", False):
        d = q.shape[-1] // heads
        if q.dim() != 3 or any(x.shape[-1] % d for x in (q, k, v)):
            return None
        q, k, v = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in (q, k, v))
    if q.dim() != 4 or q.shape[1] != heads or (not gqa and k.shape[1] != heads):
        return None
    mask = options.get("mask")
    if mask is not None:
        while mask.dim() < 4:
            mask = mask.unsqueeze(1 if mask.dim() == 3 else 0)
    low = options.get("low_precision_attention", True) is not False
    joined = not options.get("skip_output_reshape", False)
    return Call(q, k, v, mask, options.get("scale"), joined, low)


def layer_of(call: Call, forward: Forward) -> str | None:
    """Return which of LAYERS a call is, None where it may be self or cross.

    The host does not say. Attention to the image's tokens, of which the text may have as many, is
    not for low precision there. As many keys as queries are self-attention, unless the text or the
    image has as many tokens too.
    """
    queries, keys = call.q.shape[2], call.k.shape[2]
    if keys == forward.image and (keys not in (queries, forward.text) or not call.low):
        return IMAGE_CROSS
    if queries != keys:
        return CROSS
    return None if keys in (forward.text, forward.image) else SELF


@dataclass(eq=False)
class Override:
    """An attention of one mode within layers, blocks and steps; called by the host.

    steps: first and last part of the sampling, 0 to 1; a mode of 4 bits leaves out the steps at
    either end of it. guard: one of the router's. rotate: q and k, where the mode does that.
    previous: the override that was there, which gets what this one leaves.
    Raises ValueError for unknown modes, layers and guards, for a mode that cannot rotate and for
    ranges that end before they start, NoBackendError for a mode that is not built.
    """

    mode: str
    layers: str = SELF
    blocks: str = ""
    steps: tuple[float, float] = (0.0, 1.0)
    guard: str = FIRST_CALL
    rotate: bool = False
    previous: object = None
    _said: set = field(default_factory=set, init=False, repr=False)

    def __post_init__(self):
        self.mode = router.known(self.mode)
        if self.rotate:
            router.check_rotation(self.mode)
        for what, value, known in (("layers", self.layers, LAYERS), ("guard", self.guard, GUARDS)):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}; known are {', '.join(known)}")
        start, end = self.steps
        if not 0 <= start <= end <= 1:
            raise ValueError(f"steps from {start} to {end}: start to end within 0 and 1 is wanted")
        self._ranges = parse_blocks(self.blocks)
        self._key = f"lowbit_attention_{next(_keys)}"

    def forward(
        self,
        executor,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options=None,
        **kwargs,
    ):
        """Run the model once, with what is known of this run among its transformer options.

        The arguments are those of the host's `BaseModel.apply_model`, which this wraps.
        """
        options = dict(transformer_options or {})
        active = self._is_active(executor.class_obj.model_sampling, options)
        # Wan's blocks get as many tokens of an image as CLIP gave of it.
        forward = Forward(active, _tokens(c_crossattn), _tokens(kwargs.get("clip_fea")))
        options[self._key] = _running[self._key] = forward
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            _running.pop(self._key, None)

    def _is_active(self, sampling, options: dict) -> bool:
        """Return whether a step is within `steps`, and an inner one where the mode has 4 bits."""
        sigmas = options.get("sigmas")
        if ways.bits(self.mode) == 4 and not _is_inner(sigmas, options.get("sample_sigmas")):
            return False
        return is_within(self.steps, sampling, sigmas)

    def __call__(self, func, q, k, v, *args, **kwargs):
        """Return attention as `func`, the host's function, would; see `read_call`."""
        call = self._meant(q, k, v, dict(zip(POSITIONAL, args, strict=False)) | kwargs)
        if call is None or not self.runs(call):
            if self.previous is not None:
                return self.previous(func, q, k, v, *args, **kwargs)
            return func(q, k, v, *args, **kwargs)
        out = self.attend(call)
        return out.transpose(1, 2).flatten(2) if call.joined else out

    def attend(self, call: Call, prologue: Prologue = NOTHING) -> torch.Tensor:
        """Return the attention of a call that `runs`, [B, H, Lq, D], guarded as asked.

        prologue: what is done to q and k first, where `takes_prologue` says so.
        """
        way = self._way(call)
        options = {"mask": call.mask, "scale": call.scale, "guard": self.guard}
        # What `auto` takes in 16 bits has no need of it.
        options |= {"prologue": prologue, "rotate": self.rotate and router.prepares(way)}
        return router.route(call.q, call.k, call.v, way, **options)

    def takes_prologue(self, call: Call) -> bool:
        """Return whether a call that `runs` may leave norm and rotary embedding to `attend`."""
        return router.prepares(self._way(call))

    def _meant(self, q, k, v, options: dict) -> Call | None:
        """Return the call where it is within layers, blocks and steps, else None."""
        transformer = options.get("transformer_options") or {}
        compiling = torch.compiler.is_compiling()
        forward = (_running if compiling else transformer).get(self._key)
        if forward is None or not forward.active or not self._in_blocks(transformer):
            return None
        call = read_call(q, k, v, **options)
        # Not asked where it does not matter: a compiled graph would be one for each length of text.
        meant = call is not None and (self.layers == ALL or self.layers == layer_of(call, forward))
        return call if meant else None

    def _in_blocks(self, transformer: dict) -> bool:
        if self._ranges is None:
            return True
        index = transformer.get("block_index")
        return index is not None and any(index in r for r in self._ranges)

    def runs(self, call: Call) -> bool:
        """Return whether the mode takes a call; warns once of each reason why it does not."""
        way = self._way(call)
        if self.mode == "auto" and way == router.SDPA:
            return False
        if ways.bits(way) < self._bits_min(call):
            return False
        reason = router.refusal(way, call.q, call.k, call.v, call.mask)
        if reason:
            self._say(f"left to the attention that was there: {reason}")
        return reason is None

    def _way(self, call: Call) -> str:
        options = {"bits_min": self._bits_min(call), "rotate": self.rotate}
        return router.choose(call.q, call.k, call.v, self.mode, call.mask, **options)

    def _bits_min(self, call: Call) -> int:
        return 0 if call.low else 16

    def _say(self, text: str) -> None:
        """Warn, once for each text."""
        # torch.compile does not know how to log.
        if not torch.compiler.is_compiling() and text not in self._said:
            self._said.add(text)
            logger.warning("LowBit attention: %s", text)


def with_prologue(like: torch.Tensor, heads: int, transformer: dict) -> "Override | None":
    """Return the override whose `attend` may do what comes before self-attention, or None.

    like: as q, k and v are to be, [B, L, H·D]; its values do not matter. transformer: the host's
    transformer options.
    """
    override = transformer.get(OVERRIDE)
    options = {"heads": heads, "transformer_options": transformer}
    while isinstance(override, Override):
        call = override._meant(like, like, like, options)
        if call is not None and override.runs(call):
            return override if override.takes_prologue(call) else None
        override = override.previous
    return None


def forget_graphs() -> None:
    """Have every compiled model compiled anew when it runs next.

    The host's TorchCompileModel compares nothing that hangs on transformer options: a model that it
    compiled before there was an override would go on without it.
    """
    # Where nothing was compiled yet, that would be a long import.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _tokens(x) -> int | None:
    """Return how many tokens [B, L, C] has; None of what is no tensor."""
    return x.shape[-2] if torch.is_tensor(x) else None


def _is_inner(sigmas, all_sigmas) -> bool:
    """Return whether a step is neither among the first nor among the last ones of a sampling.

    all_sigmas: those of its steps, and where it ends. Of a step that is not known: False.
    """
    if sigmas is None or all_sigmas is None:
        return False
    steps = len(all_sigmas) - 1
    edge = -(-steps // EDGE)
    begun = int((all_sigmas[:-1] * SAME_SIGMA >= sigmas[0].to(all_sigmas.device)).sum())
    return edge < begun <= steps - edge
