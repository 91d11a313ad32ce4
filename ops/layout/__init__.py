"""Where the elements of a tile lie: strides, swizzles, and what threads hold of a wgmma.

A layout maps coordinates to addresses, as CuTe's does; `tests/ops/layout` derives with it the order
of keys that the attention kernel for Hopper relies on. Plain Python: nothing here runs on a GPU.
"""

from .fragment import Element, accumulator, key_order, operand_8bit, operand_16bit
from .shape import Layout, Swizzle, compose

__all__ = (
    "Element",
    "Layout",
    "Swizzle",
    "accumulator",
    "compose",
    "key_order",
    "operand_8bit",
    "operand_16bit",
)
