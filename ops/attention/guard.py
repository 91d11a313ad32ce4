"""What keeps a broken way from giving noise or black frames: a proof per shape, a check per call.

Both run within the router's operation, so they are part of a compiled graph without splitting it.
While a CUDA graph is recorded nothing is checked, as nothing can be read then.
"""

import functools
import logging
import math
from collections.abc import Callable

import torch

from . import ways
from .prologue import NOTHING, Prologue
from .reference import applied

logger = logging.getLogger(__name__)

OFF, FIRST_CALL, EVERY_CALL = GUARDS = ("off", "first_call", "every_call")
# Heads, and queries of each, that are compared, against all of their keys.
HEADS, ROWS = 4, 64
# Why a way is not to be used for a kind of call, None where it was right.
_verdicts: dict[tuple, str | None] = {}


def forget() -> None:
    """Forget what was found: each way is compared anew."""
    _verdicts.clear()
    _warn.cache_clear()


def run(
    way: str,
    compute: Callable,
    guard: str,
    q,
    k,
    v,
    mask,
    causal,
    scale,
    prologue: Prologue = NOTHING,
    rotate: bool = False,
) -> torch.Tensor:
    """Return attention by `compute`, the way's function, or by torch's where that is wrong.

    prologue, rotate: what `compute` does to q and k first.

    first_call: the first result of each way, shape and dtype is compared with torch's attention on
    some rows, and where it is broken torch's runs for such calls from then on. every_call: besides,
    a result with NaN or infinity is computed again by torch's. Each is logged once.
    """
    arguments = (q, k, v, mask, causal, scale)
    if prologue is not NOTHING:
        compute = functools.partial(compute, prologue=prologue)
    if rotate:
        compute = functools.partial(compute, rotate=True)
    if guard == OFF:
        return compute(*arguments)

    def plain() -> torch.Tensor:
        if prologue is NOTHING:
            return ways.sdpa(*arguments)
        steps = (applied(prologue, x, prologue.weight(name)) for x, name in ((q, "q"), (k, "k")))
        return ways.sdpa(*steps, *arguments[2:])

    key = (way, q.device, q.dtype, q.shape, k.shape, q.stride(1) < q.stride(2), causal, scale)
    key += (None if mask is None else (mask.dtype, mask.shape), _kind(prologue), rotate)
    if _verdicts.get(key):
        return plain()
    out = compute(*arguments)
    if _is_recording(q):
        # What looks at numbers cannot be recorded.
        return out
    if key not in _verdicts and not _proven(key, out, *arguments, prologue):
        return plain()
    if guard == EVERY_CALL and not _is_finite(out):
        _warn(f"{way} gave NaN or infinity; such calls are computed again by torch's attention")
        return plain()
    return out


def _kind(prologue: Prologue) -> tuple | None:
    """Return what a kernel's code depends on of a prologue."""
    if prologue is NOTHING:
        return None
    tensors = (prologue.q_weight, prologue.k_weight, prologue.cos)
    return prologue.norm, *(None if t is None else (t.dtype, t.dim()) for t in tensors)


def _is_recording(q: torch.Tensor) -> bool:
    if not q.is_cuda:
        return False
    with torch.cuda.device(q.device):
        return torch.cuda.is_current_stream_capturing()


def _is_finite(out: torch.Tensor) -> bool:
    """Return whether a result has neither NaN nor infinity, reading it once."""
    return bool(out.sum(dtype=torch.float32).isfinite())


def _proven(key: tuple, out, q, k, v, mask, causal, scale, prologue) -> bool:
    """Return whether some rows of a result are right, and keep the verdict.

    Rows of the last item of the batch, the last row of the last head among them. Where torch's own
    result is not finite the call says nothing of the way: it passes, without a verdict.
    """
    if not out.numel() or not k.numel():
        return True
    sizes = ((q.shape[1], HEADS), (q.shape[2], ROWS))
    heads, rows = (_spread(size, count).to(q.device) for size, count in sizes)
    of_keys = heads // (q.shape[1] // k.shape[1])
    kept = _kept(mask, causal, heads, rows, (*q.shape[:3], k.shape[2]), q.dtype)
    if prologue is NOTHING:
        few, keys = q[-1][heads[:, None], rows][None], k[-1:, of_keys]
    else:
        few = applied(prologue, q[-1:, :, rows], prologue.q_weight, heads, rows)
        keys = applied(prologue, k[-1:], prologue.k_weight, of_keys)
    want = ways.sdpa(few, keys, v[-1:, of_keys], kept, False, scale)
    got = out[-1][heads[:, None], rows][None]
    seen = _rows_with_keys(kept)
    if seen is not None:
        # Of a row without keys torch and the ways have their own ideas.
        want, got = (x.masked_fill(~seen, 0) for x in (want, got))
    error, total = torch.stack([ways.relative_error(got, want), want.float().sum()]).tolist()
    if not math.isfinite(total):
        return True
    most = ways.BROKEN[ways.bits(key[0])]
    # Not `>`, which NaN would pass.
    right = error <= most
    _verdicts[key] = None if right else f"errs by {error:.2f}"
    if not right:
        _warn(
            f"{key[0]} is wrong for q {list(q.shape)}, k {list(k.shape)} in {ways.named(q.dtype)} "
            f"on {q.device}: it errs by {error:.2f}, at most {most} is allowed. Torch's attention "
            "runs for such calls instead."
        )
    return right


def _spread(size: int, count: int) -> torch.Tensor:
    """Return so many indices below `size`, from the first to the last, or all of them."""
    return torch.linspace(0, size - 1, min(size, count)).round().long()


def _kept(mask, causal: bool, heads, rows, shape, dtype) -> torch.Tensor | None:
    """Return the mask of some rows, [1, heads, rows, keys], causal included, or None."""
    kept = None
    if mask is not None:
        kept = mask.expand(shape)[-1][heads[:, None], rows][None]
        kept = kept if kept.dtype == torch.bool else kept.to(dtype)
    if not causal:
        return kept
    before = torch.arange(shape[3], device=rows.device) <= rows[:, None]
    if kept is None or kept.dtype == torch.bool:
        return before[None, None] if kept is None else kept & before
    return kept.masked_fill(~before, -torch.inf)


def _rows_with_keys(kept: torch.Tensor | None) -> torch.Tensor | None:
    if kept is None:
        return None
    visible = kept if kept.dtype == torch.bool else kept > -torch.inf
    return visible.any(-1, keepdim=True)


@functools.cache
def _warn(text: str) -> None:
    """Warn once."""
    logger.warning("LowBit attention: %s", text)
