"""The time of runs on a GPU, as the GPU's own clock has it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .contest import Name

# Written before each sample: evicts the L2 cache, and keeps the GPU busy for longer than the host
# takes to launch what is timed. No more than this part of the GPU's memory.
CLEAR_BYTES = 1 << 31
MEMORY_PART = 16


class GpuTimer:
    """Times runs on one GPU; holds the memory that it clears the cache with."""

    def __init__(self, device: torch.device):
        total = torch.cuda.get_device_properties(device).total_memory
        size = min(CLEAR_BYTES, total // MEMORY_PART)
        self._clear = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(
        self, runs: Mapping[Name, Callable[[], Any]], samples: int
    ) -> dict[Name, list[float]]:
        """Return the milliseconds of each sample.

        Samples are taken in turn: a GPU that slows down as it heats slows down for all.
        """
        events = {name: [] for name in runs}
        with torch.cuda.device(self._clear.device):
            for _ in range(samples):
                for name, run in runs.items():
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    self._clear.zero_()
                    start.record()
                    run()
                    end.record()
                    events[name].append((start, end))
            torch.cuda.synchronize()
        return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}
