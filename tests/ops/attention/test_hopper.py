"""The CUDA C++ source of the Hopper kernel: compiled by NVRTC where it is installed."""

import ctypes
import itertools
import re
import struct

import pytest
import torch

from lowbit.ops import launch, tuning
from lowbit.ops.attention import hopper, prepass
from lowbit.ops.attention.hopper import Kind
from lowbit.ops.attention.modes import MODES
from lowbit.ops.cuda.kernel import options as kernel_options

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


@pytest.mark.parametrize("dtype", hopper.MASKS)
def test_kernel_of_masks_stays_in_registers(dtype, tmp_path):
    code = compiled(hopper.bias_source(), kernel_options((9, 0), hopper.bias_defined(dtype)))
    _, resources = disassembled(code, tmp_path)
    assert re.search(r"STACK:0\b.*LOCAL:0\b", resources)


def test_bias_is_launched_with_the_parameters_of_its_source(monkeypatch):
    found = []
    monkeypatch.setattr(hopper, "launch", lambda *given: found.append(given))
    mask = torch.zeros(2, 3, 1, 300)
    bias = hopper.bias_of(mask)
    assert bias.shape == (2, 3, 3, 132) and bias.dtype == torch.float32
    ((_, programs, arguments, *_),) = found
    names = fields_of(hopper.bias_source(), "Params")
    given = dict(zip(names, arguments, strict=True))
    assert programs == 18 and given.pop("mask") is mask and given.pop("bias") is bias
    strides = {"mask_b": 900, "mask_h": 300, "mask_l": 1}
    assert given == strides | {"heads": 3, "keys": 300, "blocks": 3}
    # As large as C's, whose first fields take 8 bytes each.
    assert struct.calcsize(f"{hopper.BIAS._pointers}P{hopper.BIAS._layout}") == 56


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bool])
def test_expanded_mask_is_not_written_out(monkeypatch, dtype):
    given = []
    monkeypatch.setattr(hopper, "_attend", lambda *x: (given.append(x[5]),))
    q = torch.zeros(1, 4, 300, 128)
    mask = torch.zeros(1, 1, 1, 300, dtype=dtype).expand(1, 4, 300, 300)
    hopper.run(q, None, q, q, q, MODES["fp8"], mask, False, 0.1)
    (seen,) = given
    assert seen.shape == (1, 1, 1, 300) and seen.dtype in hopper.MASKS


def test_mask_of_keys_is_made_once_for_all_heads():
    mask = torch.zeros(1, 1, 1, 9).expand(2, 4, 7, 9)
    assert hopper._once(mask).shape == (1, 1, 1, 9)
    assert hopper._strides(torch.zeros(1, 1, 1, 132)) == (0, 0)
    own = torch.zeros(2, 4, 1, 9).expand(2, 4, 7, 9)
    assert hopper._once(own).shape == (2, 4, 1, 9)
    assert hopper._strides(torch.zeros(2, 4, 1, 132)) == (4 * 132, 132)
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
    """A kernel that does nothing."""

    by_address = True

    def start(self, programs, arguments):
        pass


class Started:
    """What is launched on a GPU of 132 processors, on which nothing runs."""

    def __init__(self):
        # Of each call: the arguments of each launch.
        self.calls: list[list[tuple]] = []
        # Blocks and parameters of the attention itself; what is cleared before.
        self.attended, self.cleared = [], []
        # Memory that calls which are prepared take for what is between kernels.
        self.taken: list[torch.Tensor] = []

    def again(self, compiled, programs, arguments):
        self.calls[-1].append(tuple(arguments))
        compiled.start(programs, arguments)
        return compiled


@pytest.fixture
def started(monkeypatch):
    found = Started()
    loaded = object.__new__(hopper._Loaded)

    def attend(grid, threads, given, stream):
        found.attended.append((grid[0], given))

    monkeypatch.setattr(loaded, "launch", attend, raising=False)
    kernels = {id(hopper.ATTENTION): loaded}

    def first(kernel, programs, arguments, *rest):
        return found.again(kernels.get(id(kernel), Nothing()), programs, arguments)

    def empty(*size, **options):
        made = torch_empty(*size, **options)
        if made.dtype == torch.uint8:
            found.taken.append(made)
        return made

    torch_empty = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(launch, "launch", first)
    monkeypatch.setattr(launch, "again", lambda *given: found.again(*given[:3]))
    monkeypatch.setattr(hopper.nvrtc, "clear", lambda *given: found.cleared.append(given[:2]))
    monkeypatch.setattr(hopper, "_processors", lambda device: 132)
    monkeypatch.setattr(hopper, "_map_of", lambda v: v)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(prepass, "fits", lambda *_, **__: True)
    monkeypatch.setattr(prepass, "_in_flight", lambda device, d: 264)
    monkeypatch.setattr(prepass, "_held", lambda device, d: 3)
    tuning.forget()
    yield found
    tuning.forget()


def ranges_of(
    prepared: list[tuple], replayed: list[tuple], moved: dict[int, int]
) -> dict[int, tuple[int, int]]:
    """Addresses from and to of each tensor of a first call that a later one has none for, by id.

    moved: where the later call's arguments lie, by where the first one's did. Fails where the two
    launch with anything else that is not alike, or one of these has two places.
    """
    found = {}
    for before, after in zip(prepared, replayed, strict=True):
        for x, y in zip(before, after, strict=True):
            if torch.is_tensor(x) and isinstance(y, int):
                assert found.setdefault(id(x), (y, y + x.numel() * x.element_size()))[0] == y
            elif torch.is_tensor(x):
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
                # What is no argument is a result.
                assert moved.get(x.data_ptr(), y.data_ptr()) == y.data_ptr()
            else:
                assert x == y
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
def test_second_call_starts_the_same_for_other_tensors(started, mode, lse, masked):
    """Heads that share those of K, and three blocks for the keys of each tile of rows."""
    b, h, kv, length, keys = 2, 4, 2, 600, 9000
    kept = []
    for number in range(3):
        q, k, v, out = (
            torch.zeros(b, n, heads, 128, dtype=torch.bfloat16).transpose(1, 2)
            for n, heads in ((length, h), (keys, kv), (keys, kv), (length, h))
        )
        sums = torch.zeros(b, h, length) if lse else None
        mask = torch.zeros(b, h, 1, keys).expand(b, h, length, keys) if masked else None
        kept.append((q, k, v, out, sums, mask))
        started.calls.append([])
        started.taken.clear()
        hopper.run(out, sums, q, k, v, MODES[mode], mask, False, 0.1)
        blocks, (params, of_v) = started.attended[-1]
        assert (params.out, params.lse) == (out.data_ptr(), sums.data_ptr() if lse else None)
        assert (of_v is v) == (mode == "exact") and (params.v is None) == (mode == "exact")
        whole, parts = hopper.split(40, 71, 132)
        assert (whole, parts) == (0, 3) and blocks == 40 * 3
        assert started.cleared[-1] == (params.done, 40)
        assert params.done - params.partial == 40 * 3 * hopper.PARTIAL * 4
        numbers = [getattr(params, n) for n in ("rows", "keys", "tiles", "blocks", "whole")]
        assert numbers == [length, keys, 5, 71, 0]
        assert (params.out_b, params.out_h, params.out_l) == out.stride()[:3]
        divisors = [getattr(params, n).divisor for n in ("parts", "units", "heads", "group")]
        assert divisors == [3, 5, 4, 2]
        assert (params.bias_b, params.bias_h) == ((4 * 71 * 132, 71 * 132) if masked else (0, 0))
        pointers = {n: getattr(params, n) for n, _ in hopper.Params._fields_[: hopper.POINTERS]}
        pointers |= {"partial": params.partial, "bias": params.bias}
        there = {n: x for n, x in pointers.items() if x}
        assert len(set(there.values())) == len(there) and ("bias" in there) == masked
        if number == 0:
            known = set(there)
            continue
        assert set(there) == known
        # Of what is between the kernels each has its own part of one memory.
        both = zip(kept[0], kept[number], strict=True)
        moved = {a.data_ptr(): b.data_ptr() for a, b in both if a is not None}
        found = ranges_of(started.calls[0], started.calls[number], moved)
        (memory,) = started.taken
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        assert {there[n] for n in known - {"out", "lse"}} <= {first for first, _ in found.values()}
        assert all(begin <= first <= last <= end for first, last in found.values())
        for arguments in started.calls[0]:
            used = sorted({found[id(x)] for x in arguments if id(x) in found})
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))
    assert len(started.attended) == 3
