"""The format of a model whose user chooses none."""

from .checkpoint import Checkpoint
from .checkpoint.stored import stored_layers

# In 8 bits the most exact, on every GPU since Turing, and as fast as FP8 where that was measured
# (docs/results/linear.md).
BEST = "int8_convrot"


def best_format(checkpoint: Checkpoint) -> str | None:
    """Return the format to quantize a checkpoint to, None where it is quantized already.

    Another rounding would add its error to that of the first, and might take twice the memory.
    Numbers that no format here holds, GGUF's among them, cannot stay as they are.
    """
    stored = stored_layers(checkpoint)
    can_stay = stored and all(layer.format for layer in stored.values())
    return None if can_stay else BEST
