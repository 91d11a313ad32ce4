"""What `auto` takes, as data: the calls for which a way was measured to be the fastest.

The first row that holds is taken, where `lowbit tune` stored nothing for the call. Whatever none
describes goes to torch's own choice.
"""

from dataclasses import dataclass

from . import KEYS


@dataclass(frozen=True)
class Row:
    """One kind of call, not causal, in 16 bits, and what runs it.

    capability: from the first compute capability on, below the second. tokens_min: the least number
    of queries and of keys. way: a name of the router. backend: of `attention`, that has to fit;
    None where the way's own needs are enough. kinds: what may hide keys, of `attention`'s KINDS.
    """

    capability: tuple[tuple[int, int], tuple[int, int]]
    head_sizes: tuple[int, ...]
    tokens_min: int
    way: str
    backend: str | None = None
    kinds: tuple[str | None, ...] = (None,)


# Relative L2 error on normally distributed data that a way which nobody named may have. What people
# take by themselves and see no loss with errs so: SageAttention 2 by .039, 1.0.6 by .042.
MAX_ERROR = 0.045
HOPPER = ((9, 0), (10, 0))
# One H200; docs/results/attention.md and block.md have the figures.
AUTO = (
    # In a block, where power limits what runs, 13% less time than by exact, and no larger an error.
    Row(HOPPER, (128,), 16384, "lowbit_fp8", "hopper"),
    # 9 to 13% faster than cuDNN at 4,096 tokens, 5 to 9 at 3,072, where the host takes longer; fp8
    # errs three times as much and is level with it up to here.
    Row(HOPPER, (128,), 4096, "lowbit_exact", "hopper", (None, KEYS)),
    # Texts among them: torch itself takes flash attention before cuDNN's, at half the speed.
    Row(HOPPER, (128,), 256, "cudnn"),
)
