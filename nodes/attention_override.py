"""What ComfyUI calls instead of its own attention, without a need for ComfyUI.

The host calls an override with its own function first and that function's arguments after it. What
the router does not take, and what the user did not mean, goes to that function as it came.
"""

import itertools
import logging
from dataclasses import dataclass, field

import torch

from ..ops.attention import router
from ..ops.attention.blocks import LAYERS, parse_blocks

logger = logging.getLogger(__name__)

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
_keys = itertools.count()


@dataclass(frozen=True)
class Forward:
    """One run of the model. active: the step is meant. context: tokens of its text, or None."""

    active: bool
    context: int | None


@dataclass(frozen=True)
class Call:
    """One call of attention: q [B, H, Lq, D], k and v [B, Hkv, Lk, D], mask broadcast to 4-D."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    joined: bool


def read_call(q, k, v, **options) -> Call | None:
    """Return the call of one of the host's attention functions, None where it is the host's alone.

    q, k, v: [B, L, H·D], with skip_reshape [B, H, L, D]; the result is [B, L, H·D], with
    skip_output_reshape [B, H, L, D]. mask: [L, L], [B, L, L] or [B, H, L, L], as the host reads it.
    """
    low = options.get("low_precision_attention", True) is not False
    if options.keys() - KNOWN or not low or options.get("attn_precision") is not None:
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
    joined = not options.get("skip_output_reshape", False)
    return Call(q, k, v, mask, options.get("scale"), joined)


@dataclass(eq=False)
class Override:
    """An attention of one mode within layers, blocks and steps; called by the host.

    steps: first and last part of the sampling, 0 to 1. guard: results with NaN or infinity are
    computed again by SDPA. previous: the override that was there, which gets what this one leaves.
    Raises ValueError for unknown modes and layers and for ranges that end before they start.
    """

    mode: str
    layers: str = "self"
    blocks: str = ""
    steps: tuple[float, float] = (0.0, 1.0)
    guard: bool = False
    previous: object = None
    _said: set = field(default_factory=set, init=False, repr=False)

    def __post_init__(self):
        if self.layers not in LAYERS:
            raise ValueError(f"unknown layers {self.layers!r}; known are {', '.join(LAYERS)}")
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
        active = self._is_active(executor.class_obj.model_sampling, options.get("sigmas"))
        context = c_crossattn.shape[1] if torch.is_tensor(c_crossattn) else None
        options[self._key] = Forward(active, context)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _is_active(self, sampling, sigmas) -> bool:
        """Return whether a step is within `steps`, by the host's order: sigma falls."""
        start, end = self.steps
        if start == end or sigmas is None:
            return start < end
        if (start, end) == (0.0, 1.0):
            return True
        sigma = sigmas[0].item()
        before = start > 0 and sigma > sampling.percent_to_sigma(start) * SAME_SIGMA
        after = end < 1 and sigma <= sampling.percent_to_sigma(end) * SAME_SIGMA
        return not before and not after

    def __call__(self, func, q, k, v, *args, **kwargs):
        """Return attention as `func`, the host's function, would; see `read_call`."""
        call = self._taken(q, k, v, dict(zip(POSITIONAL, args, strict=False)) | kwargs)
        if call is None:
            if self.previous is not None:
                return self.previous(func, q, k, v, *args, **kwargs)
            return func(q, k, v, *args, **kwargs)
        tensors, options = (call.q, call.k, call.v), {"mask": call.mask, "scale": call.scale}
        out = router.route(*tensors, self.mode, **options)
        if self.guard and not _is_finite(out):
            self._say(f"{self.mode} gave NaN or infinity, which the guard replaces by SDPA")
            out = router.route(*tensors, router.SDPA, **options)
        return out.transpose(1, 2).flatten(2) if call.joined else out

    def _taken(self, q, k, v, options: dict) -> Call | None:
        """Return the call where it is within layers, blocks and steps and the router takes it."""
        transformer = options.get("transformer_options") or {}
        forward = transformer.get(self._key)
        if forward is None or not forward.active or not self._in_blocks(transformer):
            return None
        call = read_call(q, k, v, **options)
        if call is None or not self._in_layers(call, forward.context):
            return None
        return call if self._runs(call) else None

    def _in_blocks(self, transformer: dict) -> bool:
        if self._ranges is None:
            return True
        index = transformer.get("block_index")
        return index is not None and any(index in r for r in self._ranges)

    def _in_layers(self, call: Call, context: int | None) -> bool:
        """Return whether a call is of `layers`.

        The host does not say. As many keys as queries are self-attention, unless the text has as
        many tokens too: such a call may be either, and only `all` means it.
        """
        if self.layers == "all":
            return True
        queries, keys = call.q.shape[2], call.k.shape[2]
        if queries != keys:
            return self.layers == "cross"
        return self.layers == "self" and keys != context

    def _runs(self, call: Call) -> bool:
        given = (call.q, call.k, call.v)
        way = router.choose(*given, self.mode, call.mask)
        if self.mode == "auto" and way == router.SDPA:
            return False
        reason = router.refusal(way, *given, call.mask)
        if reason:
            self._say(f"left to ComfyUI's own attention: {reason}")
        return reason is None

    def _say(self, text: str) -> None:
        """Warn, once for each text."""
        # torch.compile does not know how to log.
        if not torch.compiler.is_compiling() and text not in self._said:
            self._said.add(text)
            logger.warning("LowBit attention: %s", text)


def _is_finite(out: torch.Tensor) -> bool:
    """Return whether a result has neither NaN nor infinity, reading it once."""
    return bool(out.sum(dtype=torch.float32).isfinite())
