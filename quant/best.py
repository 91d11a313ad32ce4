"""The format of a model whose user chooses none."""

from .checkpoint import Checkpoint
from .checkpoint.stored import stored_layers

# In 8 bits the most exact, on every GPU since Turing, and as fast as FP8 where that was measured
# (docs/results/linear.md).
BEST = "int8_convrot"


def best_format(checkpoint: Checkpoint) -> str | None:
    """Return the format to quantize a checkpoint to, None where it is quantized already.

    Another rounding would add its error to that of the first, and might take twice the memory.
    """
    return None if stored_layers(checkpoint) else BEST
