"""The format of a model whose user chooses none."""

import math

from . import families
from .checkpoint import Checkpoint
from .checkpoint.stored import FP8_DTYPES, logical_shapes, stored_layers

# In 8 bits the most exact, on every GPU since Turing, and as fast as FP8 where that was measured
# (docs/results/linear.md).
BEST = "int8_convrot"


def best_format(checkpoint: Checkpoint) -> str | None:
    """Return the format to quantize a checkpoint to, None where it is quantized already.

    Another rounding would add its error to that of the first, and might take twice the memory;
    where most weights are FP8 without scales it would save none. Numbers that no format here
    holds, GGUF's among them, cannot stay as they are.
    """
    stored = stored_layers(checkpoint)
    if stored:
        can_stay = all(layer.format for layer in stored.values())
    else:
        can_stay = _is_plain_fp8(checkpoint)
    return None if can_stay else BEST


def _is_plain_fp8(checkpoint: Checkpoint) -> bool:
    """Return whether most of the diffusion model's matrices, by elements, are FP8."""
    model = families.recognise(logical_shapes(checkpoint, {}))
    matrices = [i for n, i in checkpoint.items() if n in model.renamed and len(i.shape) == 2]
    plain = sum(math.prod(info.shape) for info in matrices if info.dtype in FP8_DTYPES)
    return 2 * plain > sum(math.prod(info.shape) for info in matrices)
