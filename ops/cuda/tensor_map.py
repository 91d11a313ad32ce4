"""Tensor maps: how Hopper's copies find boxes of a tensor (CUDA driver, cuTensorMapEncodeTiled)."""

import ctypes
import functools
from collections.abc import Sequence

import torch

from . import nvrtc

# CUtensorMapDataType.
DTYPES = {torch.float16: 6, torch.bfloat16: 9, torch.float32: 7, torch.int32: 3}
BYTES = 0
# CUtensorMapSwizzle by the bytes of a box's row, CUtensorMapL2promotion to 256 bytes.
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
PROMOTE_256 = 3
MAP_BYTES = 128
# Maps that are remembered: to make one takes the host longer than to launch a kernel.
REMEMBERED = 4096
MAP_ALIGNMENT = 64


class TensorMap(ctypes.Structure):
    """CUtensorMap, a kernel's parameter; made by `no_map`, as it starts at a multiple of 64."""

    _fields_ = (("bytes", ctypes.c_char * MAP_BYTES),)


def no_map() -> TensorMap:
    """Return a new map that says nothing."""
    memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    return TensorMap.from_buffer(memory, -ctypes.addressof(memory) % MAP_ALIGNMENT)


@functools.cache
def unused_map() -> TensorMap:
    """Return the one map that says nothing, which is not to be written to."""
    return no_map()


def tensor_map(x: torch.Tensor, box: Sequence[int], swizzle: int = 128) -> TensorMap:
    """Return the map by which boxes of x come; what is outside of x arrives as zeros.

    x: 2 to 5 dimensions, the last contiguous; starts at a multiple of 16 bytes, its other strides
    are such multiples. 8-bit dtypes come as bytes. box: elements along each dimension of x.
    swizzle: bytes of a row within which chunks of 16 bytes are XORed with the row's number, or 0.
    Raises NvrtcError where the driver refuses.
    """
    return encoded(x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), tuple(box), swizzle)


@functools.lru_cache(maxsize=REMEMBERED)
def encoded(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 128,
) -> TensorMap:
    """Return the map of what has this shape and strides in elements at an address: `tensor_map`."""
    size, rank = dtype.itemsize, len(shape)
    encoded = no_map()
    result = nvrtc.driver().cuTensorMapEncodeTiled(
        *(ctypes.byref(encoded), BYTES if size == 1 else DTYPES[dtype], rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * (rank - 1))(*(stride * size for stride in reversed(strides[:-1]))),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*(1 for _ in box)),
        *(0, SWIZZLES[swizzle], PROMOTE_256, 0),
    )
    nvrtc.check(result, f"cuTensorMapEncodeTiled of {shape}, box {box}")
    return encoded
