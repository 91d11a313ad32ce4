"""Layouts as (shape, stride), composition, and swizzles.

Source: CUTLASS, media/docs/cpp/cute/01_layout.md, 02_layout_algebra.md; cute/swizzle.hpp.
"""

import math
from dataclasses import dataclass

Nested = int | tuple


def flatten(x: Nested) -> tuple[int, ...]:
    """Return the integers of a nested tuple, left to right."""
    return (x,) if isinstance(x, int) else tuple(i for part in x for i in flatten(part))


@dataclass(frozen=True)
class Swizzle:
    """XOR of an address's `bits` bits from `base + shift` on into those from `base` on."""

    bits: int
    base: int
    shift: int

    def __call__(self, address: int) -> int:
        """Return the swizzled address."""
        mask = ((1 << self.bits) - 1) << (self.base + self.shift)
        return address ^ ((address & mask) >> self.shift)


@dataclass(frozen=True)
class Layout:
    """shape, stride: nested tuples of one form. A coordinate's address is its product with stride.

    The leftmost mode of a shape moves fastest when an integer is read as a coordinate.
    Raises ValueError where shape and stride are not of one form.
    """

    shape: Nested
    stride: Nested
    swizzle: Swizzle | None = None

    def __post_init__(self):
        if _form(self.shape) != _form(self.stride):
            raise ValueError(f"layout: shape {self.shape} and stride {self.stride} differ in form")

    @property
    def size(self) -> int:
        """Return the number of coordinates."""
        return math.prod(flatten(self.shape))

    @property
    def cosize(self) -> int:
        """Return one more than the largest address, before the swizzle."""
        pairs = zip(flatten(self.shape), flatten(self.stride), strict=True)
        return 1 + sum((size - 1) * stride for size, stride in pairs)

    def __call__(self, *coordinate: Nested) -> int:
        """Return the address of a coordinate: one integer, or one for each mode, nested or not."""
        at = coordinate[0] if len(coordinate) == 1 else coordinate
        address = _address(at, self.shape, self.stride)
        return address if self.swizzle is None else self.swizzle(address)

    def addresses(self) -> list[int]:
        """Return all addresses, in the order of the coordinates."""
        return [self(i) for i in range(self.size)]


def _form(x: Nested) -> Nested:
    return 0 if isinstance(x, int) else tuple(_form(part) for part in x)


def _address(at: Nested, shape: Nested, stride: Nested) -> int:
    if isinstance(shape, int):
        if not 0 <= at < shape:
            raise ValueError(f"layout: coordinate {at} is outside of {shape}")
        return at * stride
    if isinstance(at, int):
        parts = []
        for part in shape[:-1]:
            size = math.prod(flatten(part))
            parts.append(at % size)
            at //= size
        at = (*parts, at)
    if len(at) != len(shape):
        raise ValueError(f"layout: coordinate {at} does not fit shape {shape}")
    return sum(_address(*of) for of in zip(at, shape, stride, strict=True))


def compose(outer: Layout, inner: Layout) -> Layout:
    """Return the layout with compose(outer, inner)(i) = outer(inner(i)) for every i.

    Each mode of `inner` is cut along the modes of `outer` that it runs through.
    Raises ValueError where a mode of `inner` crosses one of `outer` unevenly, which no strides say.
    """
    if inner.swizzle is not None:
        raise ValueError("layout: a swizzled inner layout has no strides to compose")
    shape, stride = _compose(outer, inner.shape, inner.stride)
    return Layout(shape, stride, outer.swizzle)


def _compose(outer: Layout, shape: Nested, stride: Nested) -> tuple[Nested, Nested]:
    if not isinstance(shape, int):
        parts = [_compose(outer, *mode) for mode in zip(shape, stride, strict=True)]
        return tuple(part[0] for part in parts), tuple(part[1] for part in parts)
    sizes, strides = [], []
    left, skip = shape, stride
    modes = list(zip(flatten(outer.shape), flatten(outer.stride), strict=True))
    for index, (size, step) in enumerate(modes):
        last = index == len(modes) - 1
        if not last and size % skip and skip % size:
            raise ValueError(f"layout: a stride of {stride} crosses a mode of {size} unevenly")
        room = left if last else max(size // skip, 1)
        take = min(left, room)
        if left % take:
            raise ValueError(f"layout: {shape} elements do not divide along a mode of {size}")
        if take > 1 or (left == 1 and not sizes):
            sizes.append(take)
            strides.append(step * skip)
        skip = max(skip // size, 1)
        left //= take
        if left == 1:
            break
    if len(sizes) == 1:
        return sizes[0], strides[0]
    return tuple(sizes), tuple(strides)
