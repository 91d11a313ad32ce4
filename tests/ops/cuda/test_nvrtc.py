"""Compiling CUDA C++ by NVRTC, where it is installed, and what its launches take."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

from lowbit.ops.cuda import nvrtc, tensor_map

from .compiled import compiled


def test_source_that_is_wrong_gives_the_compilers_log():
    with pytest.raises(nvrtc.NvrtcError, match="undefined"):
        compiled("int x = y;", ())


def test_map_is_aligned():
    assert ctypes.addressof(tensor_map.no_map()) % tensor_map.MAP_ALIGNMENT == 0


# Of CUlaunchConfig and CUlaunchAttribute in cuda.h, for 64 bits: seven numbers, the stream, the
# attributes and how many they are; the attribute's id, four bytes of nothing, 64 of its value.
CONFIG_BYTES, ATTRIBUTE_BYTES = 56, 72


@pytest.mark.parametrize("early", [False, True])
def test_launch_is_laid_out_as_the_driver_reads_it(monkeypatch, early):
    launched = []

    def launch(config, function, parameters, extra):
        config = ctypes.string_at(config, CONFIG_BYTES)
        attributes = int.from_bytes(config[40:48], "little")
        assert bool(attributes) == early
        attribute = ctypes.string_at(attributes, ATTRIBUTE_BYTES) if early else None
        places = struct.unpack("2P", ctypes.string_at(parameters, 16))
        values = [ctypes.c_int.from_address(place).value for place in places]
        launched.append((config, attribute, values))
        return 0

    calls = ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute")
    driver = SimpleNamespace(**dict.fromkeys(calls, lambda *arguments: 0), cuLaunchKernelEx=launch)
    monkeypatch.setattr(nvrtc, "driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "enter", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert nvrtc._CONFIG.size == CONFIG_BYTES
    assert nvrtc._ATTRIBUTE.size == ATTRIBUTE_BYTES
    kernel = nvrtc.Kernel(b"", "name", 1000)
    kernel.launch((2, 3, 4), 128, (ctypes.c_int(7), ctypes.c_int(8)), 0x123456789A, early=early)
    ((config, attribute, values),) = launched
    assert values == [7, 8]
    numbers = [int.from_bytes(config[i : i + 4], "little") for i in range(0, 28, 4)]
    assert numbers == [2, 3, 4, 128, 1, 1, 1000]
    assert int.from_bytes(config[32:40], "little") == 0x123456789A
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, which is allowed or not there.
    assert int.from_bytes(config[48:52], "little") == int(early)
    if early:
        assert int.from_bytes(attribute[:4], "little") == 6
        assert int.from_bytes(attribute[8:12], "little") == 1 and not any(attribute[12:])
