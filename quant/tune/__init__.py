"""Measuring, on the GPU at hand, what is the fastest for linear layers and for attention.

What wins, a tile, a backend or a way, is kept in a file outside the repository (`ops/tuning.py`),
where `scaled_mm` and both `auto` find it.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ops import registry, tuning, tuning_file
from ...ops.attention import OP as ATTENTION
from ...ops.attention.auto import SCHEMES
from ...ops.attention.auto import as_choice as as_ranking
from ...ops.fp4_mm import OP as FOUR_BIT
from ...ops.fp4_mm import choice
from ...ops.linear import OP as LINEAR
from ...ops.linear.four_bit import GROUPS
from ...ops.scaled_mm import OP as PRODUCT
from ...ops.scaled_mm.candidates import Limits, candidates
from .. import formats
from . import attention
from .attention import HEAD_SIZE, NO_MEMORY
from .contest import CannotRunError, Outcome, Timer, rank, search
from .four_bit import GROUP_OF, FourBitProduct
from .problems import Attention, Problem
from .products import TYPES, Layer, Product
from .timer import GpuTimer

__all__ = ["Attention", "Bench", "Problem", "Report", "Result", "gpu_bench", "tune"]

BACKEND, W4A16 = "triton", "w4a16"
PLAIN = "bf16 F.linear"
# Of the time that is left, what a step may take, relative to others.
WEIGHTS = {PRODUCT: 4, FOUR_BIT: 4, LINEAR: 1, ATTENTION: 4}
# What one of attention may take of it: its kernels are compiled in the first.
ATTENTION_SECONDS = 60.0


@dataclass(frozen=True)
class Bench:
    """What is measured with, and on.

    schemes: of products in 8 bits; formats: of layers, by name; four_bit: of W4A16 products. ways:
    of attention → why it cannot run, or None.
    """

    device: torch.device
    gpu: tuning.Gpu
    limits: Limits
    timer: Timer
    schemes: tuple[str, ...]
    formats: tuple[str, ...]
    four_bit: tuple[str, ...] = ()
    ways: Mapping[str, str | None] = field(default_factory=dict)

    def only(self, bits: int) -> "Bench":
        """Return the bench without what is of other weights than those of 4, or of 8, bits."""
        four = {n for n in self.formats if formats.get(n).layout.scheme in GROUPS}
        if bits == 4:
            left = tuple(name for name in self.formats if name in four)
            return dataclasses.replace(self, schemes=(), formats=left)
        left = tuple(name for name in self.formats if name not in four)
        return dataclasses.replace(self, formats=left, four_bit=())


@dataclass(frozen=True)
class Result:
    """What was measured for one problem.

    op: `scaled_mm` or `fp4_mm` (tiles), `linear` (backends) or `attention` (ways). m: the bucket,
    rows: where it was measured. default: what is taken without tuning. winner: what beat it by
    `gain`, or None; gain is infinite where the default cannot run. times_ms: medians of the race by
    name, bfloat16 with the weight that was never quantized among them. tried: timed candidates.
    failed: candidates that cannot run → why. wrong: whose result was wrong. untried: for want of
    time. note: why nothing was measured, or "".
    Of attention m is the tokens, rows the queries, n the keys and k the head size; ranking: all
    that beat the default, the fastest first; errors: relative to float64.
    """

    op: str
    scheme: str
    m: int
    rows: int
    n: int
    k: int
    default: str = ""
    winner: str | None = None
    gain: float = 0.0
    times_ms: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    untried: int = 0
    note: str = ""
    ranking: tuple[str, ...] = ()
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What `tune` did. unreached: steps for which there was no time left.

    absent: ways of attention that cannot run on this GPU → why.
    """

    gpu: tuning.Gpu
    path: str
    stored: bool
    seconds: float
    results: tuple[Result, ...]
    unreached: int
    absent: dict[str, str] = field(default_factory=dict)


def gpu_bench(index: int = 0) -> Bench:
    """Return the bench of a GPU. Raises ValueError where there is none."""
    if not torch.cuda.is_available():
        raise ValueError(
            "tune: torch sees no GPU here, and there is nothing to measure without one"
        )
    if not 0 <= index < torch.cuda.device_count():
        raise ValueError(f"tune: no GPU {index}; torch sees {torch.cuda.device_count()}")
    device = torch.device("cuda", index)
    found = torch.cuda.get_device_properties(device)
    program = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Bench(
        device,
        tuning.gpu(device),
        Limits(program, found.shared_memory_per_multiprocessor),
        GpuTimer(device),
        tuple(name for name in TYPES if BACKEND in _able(f"{name}_row", device)),
        tuple(_format_names(device)),
        tuple(GROUP_OF) if W4A16 in _able(next(iter(GROUPS)), device) else (),
        attention.able(device),
    )


def _able(scheme: str, device: torch.device) -> set[str]:
    """Return the backends of `linear` that can run a scheme on a device, if the shape fits them."""
    call = registry.Call(scheme, device, 0, 0)
    return {b.name for b in registry.backends(LINEAR) if registry.unmet(b.needs, call) is None}


def _format_names(device: torch.device) -> Iterator[str]:
    """Yield the first format of each scheme of our kernels for which a device leaves a choice."""
    left = {s for b in registry.backends(LINEAR) if b.name == BACKEND for s in b.needs.schemes}
    left |= GROUPS.keys()
    for name in formats.names():
        scheme = formats.get(name).layout.scheme
        if scheme in left and len(_able(scheme, device)) > 1:
            left.remove(scheme)
            yield name


def tune(
    problems: Sequence[Problem | Attention],
    bench: Bench,
    *,
    store: bool = True,
    max_seconds: float = math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Measure the problems, take up what wins, and return what was found.

    store: whether to write it to the file, after each step; else it counts in this process alone.
    max_seconds: shared among the steps; those for which none is left are counted. Raises OSError
    when the file cannot be written.
    """
    start = clock()
    steps = [step for problem in problems for step in _steps(problem, bench)]
    left = total = sum(WEIGHTS[op] for op, _, _ in steps)
    # Of all the time attention has half where layers follow.
    layers_follow = any(op != ATTENTION for op, _, _ in steps)
    attention_end = start + max_seconds / (2 if layers_follow else 1)
    results: list[Result] = []
    unreached = 0
    for op, name, problem in steps:
        now = clock()
        share = (start + max_seconds - now) * WEIGHTS[op] / left
        if op == ATTENTION:
            share = min(attention_end - now, ATTENTION_SECONDS)
        if share > 0:

            def expired(deadline=now + share) -> bool:
                return clock() >= deadline

            if op == ATTENTION:
                results.append(_attention(name, problem, bench, results, store, expired))
            else:
                results.append(_step(op, name, problem, bench, store, expired))
        else:
            unreached += 1
        left -= WEIGHTS[op]
        progress(total - left, total)
    return Report(
        bench.gpu,
        str(tuning_file.path()),
        store,
        clock() - start,
        tuple(results),
        unreached,
        _absent(problems, bench),
    )


def _absent(problems, bench: Bench) -> dict[str, str]:
    if not any(isinstance(problem, Attention) for problem in problems):
        return {}
    return {name: reason for name, reason in bench.ways.items() if reason}


def _steps(problem: Problem | Attention, bench: Bench) -> Iterator[tuple[str, str, Any]]:
    """Yield (operation, scheme or format, problem): tiles first, which layers then run with."""
    if isinstance(problem, Attention):
        for scheme in SCHEMES.values():
            yield ATTENTION, scheme, problem
        return
    for scheme in bench.schemes:
        yield PRODUCT, scheme, problem
    for scheme in bench.four_bit:
        yield FOUR_BIT, scheme, problem
    for name in bench.formats:
        if formats.get(name).unfit((problem.n, problem.k)) is None:
            yield LINEAR, name, problem


def _step(
    op: str, name: str, problem: Problem, bench: Bench, store: bool, expired: Callable[[], bool]
) -> Result:
    m = tuning.bucket(problem.m)
    # At the ends of the bucket a winner must not lose.
    rows = tuple(dict.fromkeys((problem.m, *tuning.bucket_rows(m))))
    run = {PRODUCT: _product, FOUR_BIT: _four_bit, LINEAR: _layer}[op]
    scheme = formats.get(name).layout.scheme if op == LINEAR else name
    result = Result(op, scheme, m, problem.m, problem.n, problem.k)
    try:
        outcome = run(name, problem, rows, bench, expired)
    except torch.OutOfMemoryError:
        return dataclasses.replace(result, note=NO_MEMORY)
    finally:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if outcome.tried:
        _take_up(op, bench.gpu, _entry(result, outcome), result, store)
    return _with_outcome(result, outcome)


def _attention(
    scheme: str,
    problem: Attention,
    bench: Bench,
    before: Sequence[Result],
    store: bool,
    expired: Callable[[], bool],
) -> Result:
    tokens = problem.tokens
    result = Result(ATTENTION, scheme, tokens, problem.queries, problem.keys, HEAD_SIZE)
    fewer = (r.times_ms for r in before if (r.op, r.scheme) == (ATTENTION, scheme) and r.m < tokens)
    able = (name for name, reason in bench.ways.items() if reason is None)
    names = attention.keeping_up(able, fewer)
    try:
        outcome, errors = _ways(scheme, problem, names, bench, expired)
    except torch.OutOfMemoryError:
        return dataclasses.replace(result, note=NO_MEMORY)
    except CannotRunError as error:
        return dataclasses.replace(result, note=str(error))
    finally:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    result = dataclasses.replace(
        _with_outcome(result, outcome), ranking=outcome.ranking, errors=errors
    )
    if not outcome.tried:
        return result
    entry = _ranking_entry(result, outcome)
    # Where time ran out, what is stored knows more.
    is_known = entry.key in tuning.lookup(ATTENTION, bench.gpu)
    if not outcome.untried or (outcome.ranking and not is_known):
        _take_up(ATTENTION, bench.gpu, entry, result, store)
    return result


def _ways(scheme: str, problem: Attention, names, bench: Bench, expired):
    """Return the outcome of the ways, and their errors."""
    contest = attention.Contest(scheme, problem, bench.device)
    names = contest.names(names)
    return rank(contest, names, problem.queries, bench.timer, expired), contest.errors


def _ranking_entry(result: Result, outcome: Outcome) -> tuning.Entry:
    """Return what is to be stored: all that beat the default, which may be nothing."""
    return tuning.Entry(
        *(result.scheme, result.n, result.k, result.m, result.rows),
        choice=as_ranking(attention.ranked(outcome)),
        ms=outcome.times_ms[outcome.winner or outcome.default],
        instead_of=outcome.default,
        instead_ms=outcome.times_ms.get(outcome.default),
    )


def _product(scheme: str, problem: Problem, rows, bench: Bench, expired) -> Outcome:
    contest = Product(scheme, max(rows), problem.n, problem.k, bench.gpu, bench.device)
    capability, integer = bench.gpu.capability, scheme == "int8"
    tried = candidates(capability, bench.limits, problem.m, integer)
    return search(contest, tried, rows, bench.timer, expired)


def _four_bit(scheme: str, problem: Problem, rows, bench: Bench, expired) -> Outcome:
    contest = FourBitProduct(scheme, max(rows), problem.n, problem.k, bench.gpu, bench.device)
    capability, group = bench.gpu.capability, GROUP_OF[scheme]
    tried = choice.candidates(capability, bench.limits, problem.m, group)
    return search(contest, tried, rows, bench.timer, expired)


def _layer(name: str, problem: Problem, rows, bench: Bench, expired) -> Outcome:
    contest = Layer(formats.get(name), max(rows), problem.n, problem.k, bench.device)
    beside = {PLAIN: lambda: contest.plain(problem.m)}
    return search(contest, contest.names(), rows, bench.timer, expired, beside)


def _entry(result: Result, outcome: Outcome) -> tuning.Entry | None:
    """Return what is to be stored, None where nothing won."""
    if outcome.winner is None:
        return None
    times, default = outcome.times_ms, outcome.default
    return tuning.Entry(
        *(result.scheme, result.n, result.k, result.m, result.rows),
        choice=_choice(outcome.winner),
        ms=times[outcome.winner],
        instead_of=_choice(default),
        instead_ms=times.get(default),
    )


def _choice(name: choice.AnyTile | str) -> Any:
    return name if isinstance(name, str) else choice.as_choice(name)


def _take_up(op, gpu: tuning.Gpu, entry: tuning.Entry | None, result: Result, store: bool) -> None:
    key = (result.scheme, result.n, result.k, result.m)
    before = tuning.lookup(op, gpu).get(key)
    if entry != before:
        tuning.use(op, gpu, {key: entry})
        if store:
            tuning.save(op, gpu, {key: entry})


def _with_outcome(result: Result, outcome: Outcome) -> Result:
    return dataclasses.replace(
        result,
        default=str(outcome.default),
        winner=None if outcome.winner is None else str(outcome.winner),
        gain=outcome.gain,
        times_ms={str(name): ms for name, ms in outcome.times_ms.items()},
        tried=outcome.tried,
        failed={str(name): why for name, why in outcome.failed.items()},
        wrong=tuple(str(name) for name in outcome.wrong),
        untried=outcome.untried,
    )
