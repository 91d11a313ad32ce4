"""The CUDA C++ source of the Hopper kernel: compiled by NVRTC where it is installed."""

import ctypes
import math
import re

import pytest
import torch

from lowbit.ops import launch, tuning
from lowbit.ops.attention import hopper, prepass
from lowbit.ops.attention.hopper import Kind
from lowbit.ops.attention.modes import MODES

from ..cuda.compiled import compiled, disassembled, fields_of

SHARED_KIB = 227
# The tensor-core instructions of Q·Kᵀ and of P·V in SASS. FP8's have P's sums beside V's channels.
INSTRUCTIONS = {
    "exact": (r"IGMMA\.64x128x32\.S8\.S8", r"HGMMA\.64x128x16\.F32"),
    "fp8": (r"IGMMA\.64x128x32\.S8\.S8", r"QGMMA\.64x136x32\.F32\.E4M3\.E4M3"),
    "int8": (r"IGMMA\.64x128x32\.S8\.S8", r"IGMMA\.64x128x32\.U8\.S8"),
}


def kinds() -> list:
    """Each kernel that is compiled."""
    found = []
    for mode in MODES.values():
        for dtype in (torch.bfloat16, torch.float16):
            found += [Kind(mode, dtype), Kind(mode, dtype, causal=True)]
            found.append(Kind(mode, dtype, biased=True))
            if mode.name in hopper.LONG_VARIANTS:
                found.append(Kind(mode, dtype, long=True))
    return found


def name_of(kind: Kind) -> str:
    said = [name for name in ("causal", "biased", "long") if getattr(kind, name)]
    return "-".join((kind.mode.name, str(kind.dtype).removeprefix("torch."), *said))


@pytest.mark.parametrize("kind", kinds(), ids=name_of)
def test_kernel_uses_wgmma_and_no_local_memory(kind, tmp_path):
    name = kind.mode.name
    sass, usage = disassembled(compiled(hopper.source(), kind.options), tmp_path)
    assert re.search(r"STACK:0\b.*LOCAL:0\b", usage)
    for instruction in INSTRUCTIONS[name]:
        assert re.search(rf"\b{instruction}\b", sass)
    # Copies to all blocks of a cluster, where there is one.
    assert ("MULTICAST" in sass) == (kind.variant["CLUSTER"] > 1)


@pytest.mark.parametrize("more", [{"causal": True}, {"biased": True}])
def test_blocks_share_copies_where_they_see_the_same_keys_alone(more):
    mode, dtype = MODES["exact"], torch.bfloat16
    assert Kind(mode, dtype, long=True).variant["CLUSTER"] == 2
    assert Kind(mode, dtype, long=True, **more).variant == Kind(mode, dtype, **more).variant


@pytest.mark.parametrize("kind", kinds(), ids=name_of)
def test_shared_memory_suffices(kind):
    # Barriers, scales and biases are apart, within four KiB.
    assert kind.shared_bytes + 4096 <= SHARED_KIB * 1024


@pytest.mark.parametrize(
    "units, blocks, at_once, want",
    [
        # Qwen-Image: ten times 132, and 24 whose keys five blocks share.
        (24 * 56, 56, 132, (1320, 5)),
        # Wan at 720p, by blocks and by pairs of them; at 480p.
        (40 * 591, 591, 132, (179 * 132, 11)),
        (40 * 296, 591, 66, (179 * 66, 5)),
        (40 * 256, 256, 132, (77 * 132, 3)),
        # Nothing is left over, or so much that nothing would be won.
        (264, 100, 132, (264, 1)),
        (131, 100, 132, (131, 1)),
        # Keys that are too few.
        (10, 7, 132, (10, 1)),
        (24, 8, 132, (24, 1)),
        (8, 64, 132, (0, 8)),
        (1, 1000, 132, (0, 16)),
    ],
)
def test_keys_are_shared_where_that_ends_sooner(units, blocks, at_once, want):
    assert hopper.split(units, blocks, at_once) == want


def test_parameters_are_laid_out_as_in_the_source():
    """Names and order of `struct Params`: ctypes and C lay out the same fields the same way."""
    names = [name.removeprefix("Divisor ") for name in fields_of(hopper.source(), "Params")]
    assert names == [name for name, _ in hopper.Params._fields_]
    assert hopper.PACKED.size == ctypes.sizeof(hopper.Params)


@pytest.mark.parametrize("at_once", [66, 108, 132])
def test_blocks_that_share_keys_are_few_and_have_some_each(at_once):
    for units in range(1, 3 * at_once, 7):
        for blocks in (1, 8, 33, 256, 1182):
            whole, parts = hopper.split(units, blocks, at_once)
            assert 0 <= units - whole < at_once and (parts == 1) == (whole == units)
            assert (units - whole) * parts <= 2 * at_once
            assert parts == 1 or blocks // parts >= 4


@pytest.mark.parametrize("d", [1, 2, 3, 5, 56, 128, 131, 591, 65537, 2**31 - 1])
def test_product_divides(d):
    given = hopper.Divisor(*hopper.divisor(d))
    assert given.divisor == d and given.multiplier == hopper.divisor(d)[1] < 2**32
    for x in (0, 1, d - 1, d, d + 1, 7 * d - 1, 23640, 2**31 - 1, (2**31 - 1) // d * d - 1):
        if 0 <= x < 2**31:
            quotient = x if d == 1 else (x * given.multiplier >> 32) >> given.shift
            assert quotient == x // d


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


def test_bias_is_float32_whatever_torch_makes_by_default():
    torch.set_default_dtype(torch.float16)
    try:
        assert hopper.bias_of(torch.ones(1, 1, 1, 9, dtype=torch.bool)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


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


class Nothing:
    """A kernel of the pre-pass that does nothing."""

    by_address = True

    def start(self, programs, arguments):
        pass


@pytest.fixture
def started(monkeypatch):
    """What the kernel is started with on a GPU of 132 processors, and what is cleared before."""
    found, cleared = [], []
    loaded = object.__new__(hopper._Loaded)
    monkeypatch.setattr(
        loaded,
        "launch",
        lambda grid, n, given, stream: found.append((grid[0], given)),
        raising=False,
    )
    kernels = {id(hopper.ATTENTION): loaded}
    monkeypatch.setattr(
        launch,
        "launch",
        lambda kernel, programs, arguments, *rest: again(
            kernels.get(id(kernel), Nothing()), programs, arguments
        ),
    )
    monkeypatch.setattr(launch, "again", lambda *given: again(*given[:3]))

    def again(compiled, programs, arguments):
        compiled.start(programs, arguments)
        return compiled

    monkeypatch.setattr(hopper.nvrtc, "clear", lambda *given: cleared.append(given[:2]))
    monkeypatch.setattr(hopper, "_processors", lambda device: 132)
    monkeypatch.setattr(hopper, "_map_of", lambda v: v)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(prepass, "fits", lambda *_, **__: True)
    monkeypatch.setattr(prepass, "_in_flight", lambda device, d: 264)
    monkeypatch.setattr(prepass, "_held", lambda device, d: 3)
    tuning.forget()
    yield found, cleared
    tuning.forget()


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
def test_second_call_starts_the_same_for_other_tensors(started, mode, lse):
    """Heads that share those of K, and three blocks for the keys of each tile of rows."""
    found, cleared = started
    b, h, kv, length, keys = 1, 4, 2, 1100, 9000
    seen = []
    for _ in range(3):
        q, k, v, out = (
            torch.zeros(b, n, heads, 128, dtype=torch.bfloat16).transpose(1, 2)
            for n, heads in ((length, h), (keys, kv), (keys, kv), (length, h))
        )
        sums = torch.zeros(b, h, length) if lse else None
        hopper.run(out, sums, q, k, v, MODES[mode], None, False, 0.1)
        blocks, (params, of_v) = found[-1]
        assert (params.out, params.lse) == (out.data_ptr(), sums.data_ptr() if lse else None)
        assert (of_v is v) == (mode == "exact") and (params.v is None) == (mode == "exact")
        whole, parts = hopper.split(36, 71, 132)
        assert (whole, parts) == (0, 3) and blocks == 36 * 3
        assert cleared[-1] == (params.done, 36)
        assert params.done - params.partial == 36 * 3 * hopper.PARTIAL * 4
        numbers = [getattr(params, n) for n in ("rows", "keys", "tiles", "blocks", "whole")]
        assert numbers == [length, keys, 9, 71, 0]
        assert (params.out_b, params.out_h, params.out_l) == out.stride()[:3]
        divisors = [getattr(params, n).divisor for n in ("parts", "units", "heads", "group")]
        assert divisors == [3, 9, 4, 2]
        assert params.bias is None
        pointers = {n: getattr(params, n) for n, _ in hopper.Params._fields_[: hopper.POINTERS]}
        seen.append({n for n, x in pointers.items() if x})
        there = [x for x in pointers.values() if x] + [params.partial]
        assert len(set(there)) == len(there)
    assert seen[0] == seen[1] == seen[2] and len(found) == 3
