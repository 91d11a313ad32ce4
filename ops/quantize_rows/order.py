"""The order of columns in which the product with 4-bit weights takes its 8-bit activations.

A sum does not depend on the order of its terms. Tensor cores want of four lanes, for each product
of 32 columns, two times four columns side by side; here these come from 32 columns in a row, so
that a lane has whole blocks of a 4-bit weight, and uses a block's scale for all of it.
"""

import torch

# Columns that change places with each other.
BLOCK = 128
# Of a block: lanes, products of 32 columns, halves of these, pairs of four columns, places.
COLUMNS = (4, 4, 2, 2, 2)
PLACES = (4, 2, 4, 2, 2)


def interleave(x: torch.Tensor) -> torch.Tensor:
    """Return x [M, K] with column 32 t + 8 j + 4 h + b of each 128 at 32 j + 16 h + 4 t + (b ^ 1).

    The even column of a packed byte is its high nibble, which tables are asked for second: so
    neighbours change places. Raises ValueError unless K % 128 = 0.
    """
    return _moved(x, COLUMNS, (2, 3, 1, 4, 5))


def restore(x: torch.Tensor) -> torch.Tensor:
    """Return x [M, K], whose columns are interleaved, with its columns in order."""
    return _moved(x, PLACES, (3, 1, 2, 4, 5))


def _moved(x: torch.Tensor, sizes: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    m, k = x.shape
    if k % BLOCK:
        raise ValueError(f"interleave: K={k} is not a multiple of {BLOCK}")
    # Bytes: not every operation knows FP8.
    blocks = x.view(torch.uint8) if x.element_size() == 1 else x
    blocks = blocks.reshape(m, k // BLOCK, *sizes).flip(-1)
    moved = blocks.permute(0, 1, *(i + 1 for i in order)).reshape(m, k)
    return moved.view(x.dtype)
