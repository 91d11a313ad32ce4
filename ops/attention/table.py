"""What `auto` takes, as data: the calls for which a way was measured to be the fastest.

The first row that holds is taken. Whatever none describes goes to torch's own choice.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One kind of call without mask, not causal, in 16 bits, and what runs it.

    capability: from the first compute capability on, below the second. tokens_min: the least number
    of queries and of keys. way: a name of the router. backend: of `attention`, that has to fit;
    None where the way's own needs are enough.
    """

    capability: tuple[tuple[int, int], tuple[int, int]]
    head_sizes: tuple[int, ...]
    tokens_min: int
    way: str
    backend: str | None = None


HOPPER = ((9, 0), (10, 0))
# docs/results/attention.jsonl has one H200 at 7,145 tokens and more. Below 1,024 quantizing would
# be the larger part of the work; cross-attention to a text lies there.
AUTO = (
    Row(HOPPER, (128,), 1024, "lowbit_exact", "hopper"),
    # Where that cannot run or is not wanted: torch itself takes flash attention before cuDNN's,
    # at half the speed. Heads other than 128: tests/gpu/test_router_gpu.py measures.
    Row(HOPPER, (64, 128, 256), 1024, "cudnn"),
)
