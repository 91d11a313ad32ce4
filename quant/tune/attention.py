"""The contest of ways to compute attention: of `auto`'s head size, without and with a mask of keys.

What is measured is the router, as models call it: tokens before heads in memory, quantizing
included. Norm and rotary embedding are not, which `lowbit_*` ways do beside it.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import torch

from ...ops.attention import auto, router, ways
from ...ops.attention.auto import BITS_MIN, HEAD_SIZE, SCHEMES, Ranked
from ...ops.attention.table import MAX_ERROR
from ...ops.attention.ways import LOWBIT, SDPA
from ...ops.failures import failures
from .contest import CannotRunError, Name, Outcome
from .problems import Attention
from .products import OUT, SEED, attempt

# As many heads as give a GPU enough to do, and as a model has: 24 of Qwen-Image at most.
HEADS_MIN, HEADS_MAX, ROWS = 8, 24, 1 << 17
# Tensors as large as q that must have room: four, their copies, and what ways make of them.
TENSORS = 16
# Keys that a mask hides, as the end of a text before an image's tokens.
HIDDEN = slice(32, 96)
# Heads, and queries of each, that are compared, against all of their keys.
CHECKED_HEADS, CHECKED_ROWS = 2, 64
# A way that takes so many times as long as the fastest is not tried with more tokens, unless the
# fastest is done so soon that what comes before the products may be what takes long.
SLOW, LEAST_MS = 2.0, 1.0
NO_MEMORY = "not enough memory"


def able(device: torch.device) -> dict[str, str | None]:
    """Return why each way of 8 bits and more but torch's own cannot run on a device, or None."""
    names = (name for name in router.NAMES if name not in ("auto", SDPA))
    return {n: router.missing(n, device) for n in names if ways.bits(n) >= BITS_MIN}


def heads_of(queries: int, free_bytes: float = math.inf) -> int:
    """Return with how many heads so many queries are measured: fewer where memory is short."""
    heads = max(HEADS_MIN, min(HEADS_MAX, ROWS // queries))
    fitting = free_bytes / (TENSORS * queries * HEAD_SIZE * OUT.itemsize)
    return heads if fitting >= heads else max(1, int(fitting))


def _free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


class Contest:
    """Ways for an attention of [1, H, Lq, 128] in bfloat16; names are the router's.

    scheme: of SCHEMES. errors: relative L2 error of each way that was checked.
    """

    def __init__(self, scheme: str, problem: Attention, device: torch.device):
        heads = heads_of(max(problem.queries, problem.keys), _free_bytes(device))
        generator = torch.Generator(device).manual_seed(SEED)

        def normal(length: int) -> torch.Tensor:
            shape = (1, length, heads, HEAD_SIZE)
            x = torch.randn(shape, generator=generator, device=device, dtype=OUT)
            return x.transpose(1, 2)

        lengths = (problem.queries, problem.keys, problem.keys)
        self._q, self._k, self._v = (normal(length) for length in lengths)
        self._mask = None
        if scheme != SCHEMES[None]:
            self._mask = torch.ones(1, 1, 1, problem.keys, dtype=torch.bool, device=device)
            self._mask[..., HIDDEN] = False
        self.errors: dict[str, float] = {}

    def names(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of the ways that take the call."""
        call = (self._q, self._k, self._v, self._mask)
        return tuple(name for name in names if router.refusal(name, *call) is None)

    def right(self, name: str, rows: int) -> bool:
        """Return whether the result is as exact as `auto` wants.

        Raises CannotRunError where the way fails, and where a way that is not ours is not exact.
        """
        device = self._q.device
        try:
            # Ours raise what kernels do; anything else is a fault of ours, to be seen.
            refusals = () if name.startswith(LOWBIT) else ways.REFUSALS
            out = attempt(lambda: self._route(name), device, refusals)
        except torch.OutOfMemoryError as error:
            raise CannotRunError(NO_MEMORY) from error
        got = out[0, self._heads][:, self._rows]
        error = ways.relative_error(got, self._expected).item()
        self.errors[name] = error
        reason = None
        if not out.isfinite().all():
            reason = "gives NaN or infinity"
        elif error > MAX_ERROR:
            reason = f"errs by {error:.3f}, `auto` takes at most {MAX_ERROR}"
        if reason and not name.startswith(LOWBIT):
            raise CannotRunError(reason)
        return reason is None

    def serves(self, name: str) -> bool:
        """Return True: `right` asks all that there is to ask."""
        return True

    def run(self, name: str, rows: int) -> torch.Tensor:
        """Return the attention by a way. Raises CannotRunError where it fails."""
        try:
            return self._route(name)
        except torch.OutOfMemoryError as error:
            raise CannotRunError(f"{name}: {NO_MEMORY}") from error
        except (*failures(), *ways.REFUSALS) as error:
            raise CannotRunError(f"{name}: {error}") from error

    def default(self, rows: int) -> str:
        """Return torch's own, whatever is built in for the GPU: what `auto` takes without all."""
        return SDPA

    def neighbours(self, name: str) -> Sequence[str]:
        """Return nothing: there are few ways, and all are candidates."""
        return ()

    def _route(self, name: str) -> torch.Tensor:
        return router.route(self._q, self._k, self._v, name, mask=self._mask)

    @functools.cached_property
    def _heads(self) -> torch.Tensor:
        return _spread(self._q.shape[1], CHECKED_HEADS, self._q.device)

    @functools.cached_property
    def _rows(self) -> torch.Tensor:
        return _spread(self._q.shape[2], CHECKED_ROWS, self._q.device)

    @functools.cached_property
    def _expected(self) -> torch.Tensor:
        """The attention of some rows of some heads in float64."""
        q = self._q[0, self._heads][:, self._rows].double()
        k, v = (x[0, self._heads].double() for x in (self._k, self._v))
        logits = q @ k.transpose(1, 2) * HEAD_SIZE**-0.5
        if self._mask is not None:
            logits = logits.masked_fill(~self._mask[0], -torch.inf)
        return logits.softmax(-1) @ v


def _spread(size: int, count: int, device: torch.device) -> torch.Tensor:
    """Return so many indices below `size`, from the first to the last, or all of them."""
    return torch.linspace(0, size - 1, min(size, count)).round().long().to(device)


def keeping_up(names: Iterable[str], before: Iterable[dict[str, float]]) -> tuple[str, ...]:
    """Return the ways that were not far slower than the fastest with fewer tokens.

    before: times in ms of each way, for each smaller number of tokens.
    """
    slow = set()
    for times in before:
        fastest = min(times.values(), default=0.0)
        if fastest >= LEAST_MS:
            slow |= {name for name, ms in times.items() if ms > SLOW * fastest}
    return tuple(name for name in names if name not in slow)


def ranked(outcome: Outcome) -> tuple[Ranked, ...]:
    """Return what beat torch's own as it is stored."""

    def one(name: Name) -> Ranked:
        return Ranked(name, outcome.times_ms[name], auto.package_version(name))

    return tuple(one(name) for name in outcome.ranking)
