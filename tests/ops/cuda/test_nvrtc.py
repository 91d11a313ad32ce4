"""Compiling CUDA C++ by NVRTC, where it is installed, and what its launches take."""

import ctypes

import pytest

from lowbit.ops.cuda import nvrtc, tensor_map

from .compiled import compiled


def test_source_that_is_wrong_gives_the_compilers_log():
    with pytest.raises(nvrtc.NvrtcError, match="undefined"):
        compiled("int x = y;", ())


def test_map_is_aligned():
    assert ctypes.addressof(tensor_map.no_map()) % tensor_map.MAP_ALIGNMENT == 0
