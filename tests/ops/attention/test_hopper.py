"""The CUDA C++ source of the Hopper kernel: compiled by NVRTC where it is installed."""

import math
import re

import pytest
import torch

from lowbit.ops.attention import hopper
from lowbit.ops.attention.modes import MODES

from ..cuda.compiled import compiled, disassembled

SHARED_KIB = 227
# The tensor-core instructions of Q·Kᵀ and of P·V in SASS, and how many of each a tile takes.
INSTRUCTIONS = {"exact": ("IGMMA", "HGMMA"), "fp8": ("IGMMA", "QGMMA"), "int8": ("IGMMA", "IGMMA")}


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("dtype", "causal", "biased"),
    [
        (torch.bfloat16, False, False),
        (torch.float16, False, False),
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, True),
    ],
)
def test_kernel_uses_wgmma_and_no_local_memory(mode, dtype, causal, biased, tmp_path):
    code = compiled(hopper.source(), hopper.options(mode, dtype, causal, biased))
    sass, usage = disassembled(code, tmp_path)
    # INT8 has two accumulators: with a mask ten of its numbers do not fit.
    stack = 40 if mode.name == "int8" and biased else 0
    assert re.search(rf"STACK:{stack}\b.*LOCAL:0\b", usage)
    for instruction in INSTRUCTIONS[mode.name]:
        assert re.search(rf"\b{instruction}\.64x128", sass)
    assert re.search(r"IGMMA\.64x128x32\.U8\.S8", sass) or mode.name != "int8"


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
def test_shared_memory_suffices(mode):
    # The barriers and scales are apart, within a KiB.
    assert hopper.shared_bytes(mode) + 1024 <= SHARED_KIB * 1024


def test_parameters_are_laid_out_as_in_the_source():
    """Names and order of `struct Params`: ctypes and C lay out the same fields the same way."""
    struct = re.search(r"struct Params \{(.*?)\};", hopper.source(), re.S).group(1)
    struct = re.sub(r"//[^\n]*", "", struct)
    fields = [
        name.strip(" *")
        for declaration in struct.split(";")
        for name in re.sub(
            r"^\s*(const )?(char|float|void|long long|int)\b", "", declaration
        ).split(",")
        if name.strip()
    ]
    assert fields == [name for name, _ in hopper.Params._fields_]


def test_bias_of_a_mask_of_keys():
    hides = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    hides[1, :, :, 130:] = False
    bias = hopper.bias_of(hides)
    assert bias.shape == (2, 1, 3, 132) and bias.dtype == torch.float32
    # Whole blocks of visible keys are marked as such.
    assert (bias[0, 0, :2] == 0).all()
    assert (bias[0, 0, 2, :44] == 0).all() and (bias[0, 0, 2, 44:128] == -torch.inf).all()
    assert (bias[1, 0, 1, 2:128] == -torch.inf).all()
    assert bias[..., 128].tolist() == [[[0, 0, 1]], [[0, 1, 1]]]
    added = hopper.bias_of(torch.full((1, 1, 1, 128), 2.0, dtype=torch.bfloat16))
    assert added[..., :128].unique().item() == pytest.approx(2 / math.log(2))
    assert (added[..., 128] == 1).all()
    added = torch.zeros(1, 1, 1, 300)
    added[..., 130], added[..., 131], added[..., 299] = torch.nan, -torch.inf, torch.inf
    # Which the kernel multiplies by 0.
    torch.testing.assert_close(
        hopper.bias_of(added)[0, 0, :, 128:],
        torch.tensor([0.0, torch.nan, 1.0])[:, None].expand(3, 4),
        equal_nan=True,
    )


def test_mask_of_keys_is_made_once_for_all_heads():
    mask = torch.zeros(1, 1, 1, 9).expand(2, 4, 7, 9)
    assert hopper._once(mask).shape == (1, 1, 1, 9)
    assert hopper._strides(hopper.bias_of(hopper._once(mask))) == (0, 0)
    own = torch.zeros(2, 4, 1, 9).expand(2, 4, 7, 9)
    assert hopper._once(own).shape == (2, 4, 1, 9)
    assert hopper._strides(hopper.bias_of(hopper._once(own))) == (4 * 132, 132)
    assert hopper._strides(None) == (0, 0)


def test_v_that_a_map_cannot_describe_is_copied():
    v = torch.zeros(1, 2, 9, 128, dtype=torch.float16)
    for good in (v, v.transpose(1, 2).contiguous().transpose(1, 2)):
        assert hopper._readable(good) is good
    for bad in (
        torch.zeros(1, 2, 9, 256, dtype=torch.float16)[..., ::2],
        torch.zeros(1, 2, 9, 129, dtype=torch.float16)[..., 1:],
        v[:, :1].expand(1, 4, 9, 128),
    ):
        assert hopper._readable(bad).is_contiguous()
