"""What `auto` takes, as data: the calls for which a way was measured to be the fastest.

Whatever no row describes goes to torch's own attention.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One kind of call without mask, not causal, in 16 bits, and what runs it.

    capability: from the first compute capability on, below the second. tokens_min: the least number
    of queries and of keys. way: a name of the router. backend: of `attention`, that has to fit.
    """

    capability: tuple[tuple[int, int], tuple[int, int]]
    head_size: int
    tokens_min: int
    way: str
    backend: str


# docs/results/attention.jsonl has one H200 at 7,145 tokens and more. Below 1,024 quantizing would
# be the larger part of the work; cross-attention to a text lies there.
AUTO = (Row(((9, 0), (10, 0)), 128, 1024, "lowbit_exact", "hopper"),)
