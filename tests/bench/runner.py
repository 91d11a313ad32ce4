"""Timing on a GPU, and the file that results go to; shared by the benchmarks of this folder."""

import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
# Written before each sample: evicts the L2 cache, and keeps the GPU busy for longer than the host
# takes to launch what is measured, so that samples are of the GPU alone.
CLEAR_BYTES = 1 << 31
SAMPLES_MS = 60
MIN_SAMPLES, MAX_SAMPLES = 15, 60
# Of a sustained measurement: a GPU that has been busy for so long has the clock that its power
# allows, and keeps it.
SETTLE_S, SUSTAINED_S, ROUNDS = 1.0, 0.7, 3
MIN_HOST_CALLS, MAX_HOST_CALLS = 3, 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds on the GPU of one call, and microseconds that it keeps the host busy."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    host_us: float


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the relative L2 distance; NaN where either holds one."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def measure(
    runs: Mapping[str, Callable[[], torch.Tensor]], clear_bytes: int = CLEAR_BYTES
) -> dict[str, Timing]:
    """Return how long each of `runs` takes, `clear_bytes` written before every sample.

    Samples are taken in turn: a GPU that slows down as it heats slows down for all. Each time in
    another order: a run begins with the clock that power left to the one before.
    """
    clear = torch.empty(clear_bytes // 4, dtype=torch.int32, device="cuda")
    slowest = max(statistics.median(times) for times in _samples(runs, clear, 3).values())
    count = int(min(max(SAMPLES_MS / slowest, MIN_SAMPLES), MAX_SAMPLES))
    timings = {}
    for name, times in _samples(runs, clear, count).items():
        timings[name] = _timing(runs[name], times)
    return timings


def _timing(run: Callable, times: list[float]) -> Timing:
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    median = statistics.median(times)
    calls = int(min(max(SAMPLES_MS / median, MIN_HOST_CALLS), MAX_HOST_CALLS))
    return Timing(median, p20, p80, _host_us(run, calls))


def _samples(
    runs: Mapping[str, Callable], clear: torch.Tensor, count: int
) -> dict[str, list[float]]:
    events = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(count):
        for name, run in order.sample(list(runs.items()), len(runs)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            clear.zero_()
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}


def measure_sustained(runs: Mapping[str, Callable[[], torch.Tensor]]) -> dict[str, Timing]:
    """Return how long each of `runs` takes when it runs again and again, as in a long job.

    Each has the GPU to itself until its clock has settled; that, in turns, several times.
    """
    samples = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            _repeat(run, SETTLE_S)
            samples[name] += _repeat(run, SUSTAINED_S)
    return {name: _timing(runs[name], times) for name, times in samples.items()}


def _repeat(run: Callable, seconds: float) -> list[float]:
    """Return the milliseconds of each of the calls, one after another, that fill `seconds`."""
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        run()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        # No more calls ahead of the GPU than keep it busy.
        if len(events) > 2:
            events[-3].synchronize()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _host_us(run: Callable, calls: int) -> float:
    # The launch queue holds about a thousand kernels: so few calls never wait for the GPU.
    start = time.perf_counter()
    for _ in range(calls):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def environment() -> dict[str, str]:
    """Return GPU, versions and date: what a result is worth nothing without."""
    import triton

    peers = ("comfy-kitchen", "sageattention")
    found = [name for name in peers if importlib.util.find_spec(name.replace("-", "_"))]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in found},
    }


def append(name: str, record: dict) -> None:
    """Add `record` and the environment to docs/results/<name>.jsonl, one line."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({**environment(), **record}) + "\n")
