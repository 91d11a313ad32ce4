"""Errors of attention by kind of data and length, and thousands of calls without a NaN.

Run on a GPU: `python -m tests.bench.bench_attention_errors`. Prints what it finds and appends it to
docs/results/attention_errors.jsonl. Errors are relative L2 distances to float64, over rows spread
over the sequence.
"""

import argparse
import random
from collections.abc import Iterator

import torch

from lowbit.ops.attention import attention
from lowbit.ops.attention.modes import MODES
from tests.bench import runner
from tests.bench.attention_data import KINDS, exact, make
from tests.bench.bench_attention import runs

LENGTHS = (4096, 32760, 75600)
HEADS = 4
ROWS = 64
CALLS = 2000
# What rounding may add to the largest value of a channel, whose mean is about zero in all kinds of
# data: E4M3 a sixteenth, the result's 16 bits another 256th.
REACH = (1 + 2**-4) * (1 + 2**-8)
# Queries and keys at most of one of the many calls.
TOKENS_MAX = 3000


def shapes() -> Iterator[tuple[str, int]]:
    """Yield (kind of data, tokens) of each comparison."""
    yield from ((kind, length) for kind in KINDS for length in LENGTHS)


def errors(kind: str, length: int) -> dict[str, float]:
    """Return the error of each way to run, by name."""
    q, k, v = make(kind, HEADS, length, length)
    rows = slice(0, length, length // ROWS)
    want = exact(q, k, v, rows)
    ways = dict(runs(q, k, v))
    for mode in MODES:
        ways[f"hopper {mode} rotated"] = lambda m=mode: attention(
            q, k, v, m, rotate=True, backend="hopper"
        )
    return {name: runner.relative_error(run()[:, :, rows], want) for name, run in ways.items()}


def call(chance: random.Random, seed: int, mode: str, backend: str) -> torch.Tensor:
    """Return whether one call of random shape, layout and data went wrong, [] bool.

    Wrong: a number that is not finite, or further from zero than any value of its channel can be
    once it is rounded. Both layouts have to give the same bits.
    """
    heads, queries, keys = chance.randint(1, 8), *(chance.randint(1, TOKENS_MAX) for _ in "qk")
    q, k, v = make(chance.choice(KINDS), heads, queries, keys, seed)
    out = attention(q, k, v, mode, backend=backend)
    other = attention(*(x.contiguous() for x in (q, k, v)), mode, backend=backend)
    reach = v.abs().amax(2, keepdim=True).float() * REACH
    return ((out.float().abs() <= reach).logical_not() | (out != other)).any()


def many_calls(mode: str, backend: str, count: int) -> int:
    """Return how many of `count` calls went wrong."""
    chance, wrong = random.Random(0), torch.zeros((), dtype=torch.int64, device="cuda")
    for seed in range(count):
        wrong += call(chance, seed, mode, backend)
    return int(wrong)


@torch.inference_mode()
def main() -> None:
    """Compare, call, print and append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS, help="of each mode and backend")
    count = parser.parse_args().calls
    for kind, length in shapes():
        found = errors(kind, length)
        print(kind, length, *(f"{name} {value:.4f}" for name, value in found.items()), sep=" | ")
        record = {"data": kind, "heads": HEADS, "tokens": length, "errors": found}
        runner.append("attention_errors", record)
    for backend in ("hopper", "triton"):
        for mode in MODES:
            wrong = many_calls(mode, backend, count)
            print(f"{backend} {mode}: {wrong} of {count} calls went wrong", flush=True)
            record = {"backend": backend, "mode": mode, "calls": count, "wrong": wrong}
            runner.append("attention_errors", record)


if __name__ == "__main__":
    main()
