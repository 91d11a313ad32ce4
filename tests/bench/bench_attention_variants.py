"""Variants of the Hopper kernel of `attention`, without pauses, with the power and clock of each.

Run on a GPU: `python -m tests.bench.bench_attention_variants`, with `--only exact` for one mode.
What power limits is told apart from what the kernel does by TFLOP/s for each MHz. Prints a table
and appends it to docs/results/attention_variants.jsonl.
"""

import argparse
import importlib.util
import statistics
import subprocess
from collections.abc import Callable, Iterator

import torch

from lowbit.ops import tuning
from lowbit.ops.attention import attention, hopper
from tests.bench import attention_data, runner
from tests.bench.attention_data import D

HEADS = 40
# Wan 14B at 720p and at 480p.
TOKENS = (75600, 32760)
# What differs from `hopper.VARIANTS`, by mode.
VARIANTS = {
    "exact": ({}, {"CLUSTER": 2, "STAGES": 4, "DOUBLE": 0}),
    "fp8": ({}, {"CLUSTER": 2}, {"PINGPONG": 1}),
    "int8": ({}, {"CLUSTER": 2}, {"PINGPONG": 1}),
}
SETTLE_S, SUSTAINED_S, ROUNDS = 0.5, 0.7, 2
QUERY = ("nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits")
EVERY_MS = "100"


def shapes() -> Iterator[tuple[int, int]]:
    """Yield (heads, tokens)."""
    yield from ((HEADS, tokens) for tokens in TOKENS)


def _runs(q, k, v, only: str) -> Iterator[tuple[str, dict, Callable]]:
    """Yield (way, what differs, function), each with the same result in all its variants."""
    if importlib.util.find_spec("sageattention"):
        import sageattention

        yield "sageattn", {}, lambda: sageattention.sageattn(q, k, v, tensor_layout="HND")
    for mode, variants in VARIANTS.items():
        for changed in variants if only in mode else ():

            def run(mode=mode, changed=changed) -> torch.Tensor:
                if hopper.LONG_VARIANTS.get(mode) is not changed:
                    hopper.LONG_VARIANTS[mode] = changed
                    tuning.forget()
                return attention(q, k, v, mode, backend="hopper")

            yield mode, changed, run


def _sustained(run: Callable) -> dict[str, float]:
    """Return the median milliseconds of a round, and the mean power and clock meanwhile."""
    with subprocess.Popen((*QUERY, "-lms", EVERY_MS), stdout=subprocess.PIPE, text=True) as smi:
        runner._repeat(run, SETTLE_S)
        times = runner._repeat(run, SUSTAINED_S)
        smi.terminate()
        lines = [line.split(",") for line in smi.stdout.read().splitlines() if "," in line]
    # The later half is of the time that is measured.
    later = lines[len(lines) // 2 :]
    power, clock = (statistics.mean(float(line[i]) for line in later) for i in (0, 1))
    return {"median_ms": statistics.median(times), "power_w": power, "clock_mhz": clock}


@torch.inference_mode()
def main() -> None:
    """Time every variant in turns, print the table, append the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only modes whose name holds this")
    only = parser.parse_args().only
    # Each block has all keys of its rows: blocks that share copies would share other keys' sums.
    # Every length is a long one here, and is told its variant.
    hopper.LONG_KEYS, hopper.split = 0, lambda units, blocks, at_once: (units, 1)
    for heads, tokens in shapes():
        q, k, v = attention_data.make("normal", heads, tokens, tokens)
        runs = list(_runs(q, k, v, only))
        first: dict[str, torch.Tensor] = {}
        for way, changed, run in runs:
            if not torch.equal(run(), first.setdefault(way, run())):
                raise RuntimeError(f"{way} {changed} gives other bits: not timed")
        first.clear()
        rounds = [[_sustained(run) for _, _, run in runs] for _ in range(ROUNDS)]
        operations = 4 * heads * tokens * tokens * D
        for (way, changed, _), measured in zip(runs, zip(*rounds, strict=True), strict=True):
            made = [{**r, "tflops": operations / r["median_ms"] / 1e9} for r in measured]
            cells = (f"{r['tflops']:.0f} at {r['clock_mhz']:.0f} MHz" for r in made)
            print(f"{tokens} {way} {changed}: {', '.join(cells)}", flush=True)
            record = {"heads": heads, "tokens": tokens, "way": way, "changed": changed}
            runner.append("attention_variants", {**record, "rounds": made})


if __name__ == "__main__":
    main()
