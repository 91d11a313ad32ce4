"""The search for what is fastest: every candidate is checked, the promising ones race the default.

Nothing here knows of GPUs, tiles or backends: the contest brings what to check and to run, the
timer how to time it.
"""

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

# A winner is faster than the default by more than this, in every round.
NOISE = 0.02
ROUNDS = 3
# Samples of a candidate when it is first seen, and of each finalist in a round.
FIRST_SAMPLES = 3
ROUND_SAMPLES = 11
FINALISTS = 4
# All of a ranking: slower than the default by more when first seen, it is not raced; and about so
# long may the races take.
FAR = 1.25
RACES_MS = 1500.0

Name = Hashable
# Runs by name, samples of each → times in ms. Samples of different names are taken in turn.
Timer = Callable[[Mapping[Name, Callable[[], Any]], int], Mapping[Name, Sequence[float]]]


class CannotRunError(Exception):
    """A candidate does not compile or start, for too much shared memory, say; or is too coarse."""


class Contest(Protocol):
    """What is searched for, for some numbers of rows. Names are of candidates."""

    def right(self, name: Name, rows: int) -> bool:
        """Return whether the candidate's result is right. Raises CannotRunError."""

    def serves(self, name: Name) -> bool:
        """Return whether all that would take it once it won is right. Raises CannotRunError."""

    def run(self, name: Name, rows: int) -> Any:
        """Run the candidate as it is to be timed."""

    def default(self, rows: int) -> Name:
        """Return what is taken where nothing is tuned."""

    def neighbours(self, name: Name) -> Sequence[Name]:
        """Return further candidates, to be tried where this one is the fastest."""


@dataclass
class Outcome:
    """What `search` found.

    default: what is taken at the first number of rows without tuning. winner: what beats it, or
    None. gain: by how much at least, 0.1 for 10 %; infinite where the default cannot run.
    times_ms: medians of the race at the first number of rows. tried: candidates that were timed.
    failed: why others could not run. wrong: those whose result was wrong. untried: candidates
    that the time did not suffice for. ranking: of `rank`, what beats the default, fastest first.
    """

    default: Name
    winner: Name | None = None
    gain: float = 0.0
    times_ms: dict[Name, float] = field(default_factory=dict)
    tried: int = 0
    failed: dict[Name, str] = field(default_factory=dict)
    wrong: list[Name] = field(default_factory=list)
    untried: int = 0
    ranking: tuple[Name, ...] = ()


def search(
    contest: Contest,
    candidates: Sequence[Name],
    rows: Sequence[int],
    timer: Timer,
    expired: Callable[[], bool] = lambda: False,
    beside: Mapping[Name, Callable[[], Any]] | None = None,
) -> Outcome:
    """Return what beats the default for every number of `rows`.

    rows: at the first, the winner has to be faster by more than the noise; at the others it must
    not be slower by more. expired: once true, no further candidates are tried. beside: runs that
    are timed in the race and cannot win.
    """
    first = rows[0]
    outcome = Outcome(contest.default(first))
    wanted = dict.fromkeys((outcome.default, *candidates))
    seen = _screen(contest, wanted, first, timer, expired, outcome)
    if seen:
        fastest = min(seen, key=seen.__getitem__)
        more = [name for name in contest.neighbours(fastest) if name not in wanted]
        seen |= _screen(contest, dict.fromkeys(more), first, timer, expired, outcome)
    outcome.tried = len(seen)
    challengers = sorted(seen.keys() - {outcome.default}, key=seen.__getitem__)[:FINALISTS]
    entrants = challengers + ([outcome.default] if outcome.default in seen else [])
    rounds = _race(contest, entrants, first, timer, beside or {}) if entrants else []
    outcome.times_ms = {name: _median(rounds, name) for name in (rounds[0] if rounds else {})}
    for name in sorted(challengers, key=outcome.times_ms.__getitem__):
        gain = _gain(rounds, name, outcome.default)
        if gain > NOISE and _holds(contest, name, rows[1:], timer, outcome):
            outcome.winner, outcome.gain = name, gain
            break
    return outcome


def rank(
    contest: Contest,
    candidates: Sequence[Name],
    rows: int,
    timer: Timer,
    expired: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Return all that beats the default for a number of rows by more than the noise, as `ranking`.

    times_ms: of those that were not raced, from when they were first seen. Samples are fewer where
    runs are long. Raises CannotRunError where one fails that ran before.
    """
    outcome = Outcome(contest.default(rows))
    wanted = dict.fromkeys((outcome.default, *candidates))
    seen = _screen(contest, wanted, rows, timer, expired, outcome)
    outcome.tried, outcome.times_ms = len(seen), seen
    limit = seen.get(outcome.default, math.inf) * FAR
    entrants = [name for name in seen if seen[name] <= limit]
    if not set(entrants) - {outcome.default}:
        return outcome
    fitting = int(RACES_MS / ROUNDS / sum(seen[name] for name in entrants))
    samples = min(max(fitting, 1), ROUND_SAMPLES)
    rounds = _race(contest, entrants, rows, timer, {}, samples)
    outcome.times_ms = seen | {name: _median(rounds, name) for name in entrants}
    gains = {n: _gain(rounds, n, outcome.default) for n in entrants if n != outcome.default}
    faster = [name for name, gain in gains.items() if gain > NOISE]
    outcome.ranking = tuple(sorted(faster, key=outcome.times_ms.__getitem__))
    if outcome.ranking:
        outcome.winner = outcome.ranking[0]
        outcome.gain = gains[outcome.winner]
    return outcome


def _screen(contest, names, rows, timer, expired, outcome: Outcome) -> dict[Name, float]:
    """Return a first time of each candidate that runs and is right."""
    seen = {}
    for name in names:
        if expired():
            outcome.untried += 1
        elif _is_right(contest, name, rows, outcome):
            run = {name: lambda name=name: contest.run(name, rows)}
            seen[name] = statistics.median(timer(run, FIRST_SAMPLES)[name])
    return seen


def _is_right(contest: Contest, name: Name, rows: int, outcome: Outcome) -> bool:
    return _passes(lambda: contest.right(name, rows), name, outcome)


def _passes(check: Callable[[], bool], name: Name, outcome: Outcome) -> bool:
    """Return what `check` returns, False where it cannot run, and note what went wrong."""
    try:
        right = check()
    except CannotRunError as error:
        outcome.failed[name] = str(error)
        return False
    if not right and name not in outcome.wrong:
        outcome.wrong.append(name)
    return right


def _race(
    contest: Contest, names, rows: int, timer: Timer, beside, samples: int = ROUND_SAMPLES
) -> list[Mapping[Name, float]]:
    """Return the medians of every round."""
    runs = {name: lambda name=name: contest.run(name, rows) for name in names}
    rounds = [timer({**runs, **beside}, samples) for _ in range(ROUNDS)]
    return [{name: statistics.median(times) for name, times in r.items()} for r in rounds]


def _median(rounds, name: Name) -> float:
    return statistics.median(r[name] for r in rounds)


def _gain(rounds, name: Name, default: Name) -> float:
    """Return by how much a candidate beats the default in its worst round."""
    return min(r[default] / r[name] - 1 if default in r else math.inf for r in rounds)


def _holds(contest: Contest, name: Name, others, timer: Timer, outcome: Outcome) -> bool:
    """Return whether a candidate serves all, and does not lose at other numbers of rows."""
    if not _passes(lambda: contest.serves(name), name, outcome):
        return False
    return all(_keeps_up(contest, name, rows, timer, outcome) for rows in others)


def _keeps_up(contest: Contest, name: Name, rows: int, timer: Timer, outcome: Outcome) -> bool:
    """Return whether a candidate is right for so many rows, and not slower than the default."""
    default = contest.default(rows)
    if name == default:
        return True
    if not _is_right(contest, name, rows, outcome):
        return False
    entrants = [name, *([default] if _is_right(contest, default, rows, outcome) else [])]
    rounds = _race(contest, entrants, rows, timer, {})
    slowest = math.inf if len(entrants) == 1 else _median(rounds, default) * (1 + NOISE)
    return _median(rounds, name) <= slowest
