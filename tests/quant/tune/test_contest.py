"""The search alone: what wins, by a timer whose times the tests make up."""

import itertools
import math

import pytest

from lowbit.quant.tune.contest import (
    FINALISTS,
    FIRST_SAMPLES,
    NOISE,
    RACES_MS,
    ROUND_SAMPLES,
    ROUNDS,
    CannotRunError,
    rank,
    search,
)


class Timer:
    """Times by name, one or several that are given in turn; counts what was run."""

    def __init__(self, **times):
        self._times = {
            name: itertools.cycle(ms if isinstance(ms, list) else [ms])
            for name, ms in times.items()
        }
        self.ran = []

    def __call__(self, runs, samples):
        for name, run in runs.items():
            run()
            self.ran.append(name)
        # One time a call: a round is slow or fast as a whole.
        return {name: [next(self._times[name])] * samples for name in runs}


class Contest:
    """Names are letters; "d" is the default unless `defaults` has another for the rows."""

    def __init__(self, wrong=(), failing=(), neighbours=None, defaults=None, serving=None):
        self._wrong, self._failing, self._serving = set(wrong), set(failing), serving or {}
        self._neighbours, self._defaults = neighbours or {}, defaults or {}
        self.checked = []

    def right(self, name, rows):
        self.checked.append((name, rows))
        if name in self._failing or (name, rows) in self._failing:
            raise CannotRunError(f"{name}: out of resource")
        return name not in self._wrong and (name, rows) not in self._wrong

    def serves(self, name):
        answer = self._serving.get(name, True)
        if isinstance(answer, str):
            raise CannotRunError(answer)
        return answer

    def run(self, name, rows):
        assert (name, rows) in self.checked, "timed before it was checked"

    def default(self, rows):
        return self._defaults.get(rows, "d")

    def neighbours(self, name):
        return self._neighbours.get(name, ())


def test_fastest_wins():
    outcome = search(Contest(), "abc", [512], Timer(a=3, b=1, c=2, d=4))
    assert outcome.winner == "b"
    assert outcome.gain == pytest.approx(3)
    assert outcome.times_ms == {"a": 3, "b": 1, "c": 2, "d": 4}
    assert outcome.tried == 4


@pytest.mark.parametrize(("ms", "winner"), [(1, None), (0.99, None), (0.9, "a"), (1.5, None)])
def test_winner_is_faster_by_more_than_the_noise(ms, winner):
    assert search(Contest(), "a", [512], Timer(a=ms, d=1)).winner == winner


def test_winner_is_faster_in_every_round():
    # A first look, then the rounds.
    steady = Timer(a=[0.9] * (1 + ROUNDS), d=1)
    assert search(Contest(), "a", [512], steady).winner == "a"
    once_slow = Timer(a=[0.5, 0.5, 1.0, 0.5], d=1)
    outcome = search(Contest(), "a", [512], once_slow)
    assert outcome.winner is None
    assert outcome.times_ms["a"] == 0.5


def test_wrong_result_cannot_win_however_fast():
    contest = Contest(wrong="a")
    timer = Timer(b=2, d=3)
    outcome = search(contest, "ab", [512], timer)
    assert (outcome.winner, outcome.wrong, outcome.tried) == ("b", ["a"], 2)
    assert "a" not in timer.ran


def test_candidate_that_cannot_run_is_counted_with_its_reason():
    outcome = search(Contest(failing="a"), "ab", [512], Timer(b=2, d=3))
    assert outcome.winner == "b"
    assert outcome.failed == {"a": "a: out of resource"}


def test_where_the_default_cannot_run_the_fastest_wins():
    outcome = search(Contest(failing="d"), "ab", [512], Timer(a=2, b=3))
    assert (outcome.winner, outcome.gain) == ("a", math.inf)
    assert "d" not in outcome.times_ms


def test_wrong_default_is_reported_and_replaced():
    outcome = search(Contest(wrong="d"), "a", [512], Timer(a=2))
    assert (outcome.winner, outcome.wrong) == ("a", ["d"])


def test_nothing_that_runs_is_no_winner():
    outcome = search(Contest(failing="ad"), "a", [512], Timer())
    assert (outcome.winner, outcome.tried, outcome.times_ms) == (None, 0, {})


def test_neighbours_of_the_fastest_are_tried_too():
    contest = Contest(neighbours={"b": "efd", "a": "x"})
    outcome = search(contest, "ab", [512], Timer(a=3, b=2, d=4, e=1, f=5))
    assert (outcome.winner, outcome.tried) == ("e", 5)


def test_few_race_and_they_are_the_fastest():
    names = "abcefghi"
    times = {name: index + 1 for index, name in enumerate(names)}
    timer = Timer(**times, d=100)
    outcome = search(Contest(), names, [512], timer)
    assert set(outcome.times_ms) == {*names[:FINALISTS], "d"}


def test_winner_does_not_lose_at_the_ends_of_the_bucket():
    """`a` wins by more, but is wrong at 400 rows; `b` cannot run there; `c` does."""
    contest = Contest(wrong=[("a", 400)], failing=[("b", 400)])
    outcome = search(contest, "abc", [512, 400], Timer(a=1, b=2, c=3, d=4))
    assert outcome.winner == "c"
    assert (outcome.wrong, list(outcome.failed)) == (["a"], ["b"])


def test_winner_serves_whatever_would_take_it():
    """`a` is wrong for another call, `b` cannot run one."""
    contest = Contest(serving={"a": False, "b": "out of resource"})
    outcome = search(contest, "abc", [512], Timer(a=1, b=2, c=3, d=4))
    assert (outcome.winner, outcome.wrong, outcome.failed) == ("c", ["a"], {"b": "out of resource"})


@pytest.mark.parametrize(
    ("there", "winner"), [(1, "a"), (1 / (1 + NOISE / 2), "a"), (1 / (1 + 2 * NOISE), None)]
)
def test_at_the_ends_it_may_be_slower_by_no_more_than_the_noise(there, winner):
    """There another candidate, `e`, is the default."""
    contest = Contest(defaults={400: "e"})
    assert search(contest, "a", [512, 400], Timer(a=1, d=2, e=there)).winner == winner


def test_what_is_the_default_at_the_other_end_need_not_beat_itself():
    contest = Contest(defaults={400: "a"})
    assert search(contest, "a", [512, 400], Timer(a=1, d=2)).winner == "a"


def test_what_stands_beside_the_race_is_timed_and_cannot_win():
    outcome = search(
        Contest(), "a", [512], Timer(a=2, d=3, plain=1), beside={"plain": lambda: None}
    )
    assert outcome.winner == "a"
    assert outcome.times_ms["plain"] == 1


def test_when_the_time_is_up_what_was_seen_races():
    left = iter([False, False, False])
    outcome = search(
        Contest(neighbours={"b": "e"}),
        "abc",
        [512],
        Timer(a=2, b=1, d=3),
        expired=lambda: next(left, True),
    )
    assert outcome.winner == "b"
    assert (outcome.tried, outcome.untried) == (3, 2)


def test_no_time_at_all_is_no_winner_and_no_race():
    timer = Timer()
    outcome = search(Contest(), "ab", [512], timer, expired=lambda: True)
    assert (outcome.winner, outcome.tried, outcome.untried, timer.ran) == (None, 0, 3, [])


def test_ranking_is_of_all_that_beat_the_default_by_more_than_the_noise():
    times = {"a": 3, "b": 1, "c": 2, "d": 4, "e": 4 / (1 + NOISE / 2), "f": 4.5, "g": 9}
    timer = Timer(**times)
    outcome = rank(Contest(), "abcefg", 512, timer)
    assert outcome.ranking == ("b", "c", "a")
    assert (outcome.winner, outcome.gain, outcome.tried) == ("b", 3.0, 7)
    assert outcome.times_ms == times
    # What is far slower when first seen is not raced.
    assert timer.ran.count("g") == 1 and timer.ran.count("f") == 1 + ROUNDS


def test_ranking_wants_every_round():
    outcome = rank(Contest(), "ab", 512, Timer(a=[1, 1, 5, 1], b=2, d=4))
    assert outcome.ranking == ("b",)


def test_ranking_of_nothing_is_empty_and_nothing_races():
    timer = Timer(d=4, a=9)
    outcome = rank(Contest(wrong="b", failing="c"), "abc", 512, timer)
    assert (outcome.ranking, outcome.winner, outcome.wrong) == ((), None, ["b"])
    assert list(outcome.failed) == ["c"] and timer.ran == ["d", "a"]


def test_ranking_without_a_default_is_of_what_runs():
    outcome = rank(Contest(failing="d"), "ab", 512, Timer(a=3, b=2))
    assert outcome.ranking == ("b", "a") and math.isinf(outcome.gain)


def test_long_runs_are_sampled_less():
    for ms, wanted in ((1e-3, ROUND_SAMPLES), (RACES_MS / ROUNDS / 8, 4), (1e6, 1)):
        samples = []

        def timer(runs, count, ms=ms, samples=samples):
            samples.append(count)
            return {name: [ms] * count for name in runs}

        rank(Contest(), "a", 512, timer)
        assert samples == [FIRST_SAMPLES] * 2 + [wanted] * ROUNDS
