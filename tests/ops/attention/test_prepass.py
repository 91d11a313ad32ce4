"""The CUDA C++ pre-pass of attention without a GPU: its machine code, its parameters, its order."""

import re
import struct

import pytest
import torch

from lowbit.ops.attention import prepass
from lowbit.ops.attention.modes import MODES
from lowbit.ops.attention.prologue import NOTHING, Prologue
from lowbit.ops.cuda.kernel import options

from ..cuda.compiled import compiled, disassembled, fields_of

HEADS, D = 4, 128
FILES = ("survey.cu", "pack_rows.cu", "pack_values.cu")
# Of a thread: what the compiler may keep in memory. Of a log-sum-exp with Wan's steps it is most.
STACK_BYTES, LSE_STACK_BYTES = 64, 80


def prologue(name: str, d: int = D) -> Prologue:
    """Those of Wan and Qwen-Image."""
    one = torch.ones(1, dtype=torch.bfloat16)
    angles = {"cos": torch.ones(9, d // 2), "sin": torch.ones(9, d // 2)}
    if name == "token":
        weight = one.expand(HEADS * d).contiguous()
        return Prologue("token", 1e-6, weight, weight, **angles)
    if name == "head":
        weight = one.expand(2, d).contiguous()
        return Prologue("head", 1e-6, weight, weight, 5, **angles)
    return NOTHING


def names(
    name: str,
    mode: str = "fp8",
    rotate: bool = False,
    d: int = D,
    dtype=torch.bfloat16,
    shift: bool = False,
):
    swizzled = d == D
    groups = 4 if swizzled else 1
    given = prologue(name, d), MODES[mode], groups, swizzled, shift, rotate
    return prepass.defined(d, dtype, *given)


def usage(file: str, capability: tuple[int, int], given, tmp_path) -> tuple[str, list[int]]:
    """(SASS, bytes of stack of each kernel) of a file."""
    code = compiled(prepass.source(file), options(capability, given))
    sass, resources = disassembled(code, tmp_path)
    assert not re.search(r"LOCAL:[1-9]", resources)
    return sass, [int(n) for n in re.findall(r"STACK:(\d+)", resources)]


@pytest.mark.parametrize(
    ("rotate", "shift"), [(False, False), (True, False), (False, True)], ids=["", "rotate", "lse"]
)
@pytest.mark.parametrize("name", ["none", "token", "head"])
def test_rows_hardly_leave_registers(name, rotate, shift, tmp_path):
    given = names(name, rotate=rotate, shift=shift)
    sass, stacks = usage("pack_rows.cu", (9, 0), given, tmp_path)
    assert max(stacks) <= (LSE_STACK_BYTES if shift else STACK_BYTES)
    # The next head's rows come to shared memory 16 bytes at a time, meanwhile.
    assert "LDGSTS.E.BYPASS.128" in sass or "LDGSTS.E.128" in sass
    # Norms over all heads by the tensor cores.
    assert ("HMMA.1688" in sass) == (name == "token")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", prepass.WIDTHS)
@pytest.mark.parametrize("mode", ["fp8", "int8"])
def test_values_stay_in_registers_and_their_sums_are_products(mode, d, dtype, tmp_path):
    given = names("none", mode, d=d, dtype=dtype)
    sass, stacks = usage("pack_values.cu", (9, 0), given, tmp_path)
    assert max(stacks) == 0 and len(stacks) == (4 if mode == "int8" else 2)
    assert ("HMMA.16816" in sass) == (mode == "fp8") and ("IDP.4A" in sass) == (mode == "int8")


@pytest.mark.parametrize("name", ["none", "token", "head"])
def test_survey_stays_in_registers(name, tmp_path):
    assert max(usage("survey.cu", (9, 0), names(name), tmp_path)[1]) == 0


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
@pytest.mark.parametrize("d", prepass.WIDTHS)
def test_other_gpus_have_all_instructions(capability, d, tmp_path):
    modes = ("int8",) if capability < (8, 9) else ("fp8", "int8")
    files = [(file, modes[0]) for file in FILES] + [("pack_values.cu", mode) for mode in modes[1:]]
    for file, mode in files:
        given = names("token", mode, d=d, dtype=torch.float16)
        _, stacks = usage(file, capability, given, tmp_path)
        assert max(stacks) <= 2 * STACK_BYTES


def launches(monkeypatch, mode: str, p: Prologue, **shape) -> tuple[list[tuple], tuple]:
    """What `run` launches on a GPU of 132 processors, and what it returns."""
    made = []
    monkeypatch.setattr(prepass, "_in_flight", lambda device, d: 264)
    monkeypatch.setattr(prepass, "_held", lambda device, d: shape.get("held", 3))
    monkeypatch.setattr(prepass, "launch", lambda *given: made.append(given))
    b, h, heads, queries, keys = (shape.get(n, 2) for n in ("b", "h", "heads", "queries", "keys"))
    q = torch.zeros(b, h, queries, D, dtype=torch.bfloat16)
    k, v = torch.zeros(2, b, heads, keys, D, dtype=torch.bfloat16).unbind()
    given = 0.5, MODES[mode], 4, True, True, p, False
    return made, prepass.run(q, k, v, *given)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", ["none", "token", "head"])
def test_parameters_are_those_of_the_source(monkeypatch, mode, name):
    p = prologue(name)
    shape = {"b": 2, "h": HEADS, "heads": HEADS, "queries": 300, "keys": 3000}
    made, fields = launches(monkeypatch, mode, p, **shape)
    known = fields_of(prepass.source("survey.cu"), "Params")
    arguments = dict(zip(known, made[0][2], strict=True))
    pointers = known[: prepass.POINTERS]
    assert all(x is None or torch.is_tensor(x) for x in map(arguments.get, pointers))
    assert not any(torch.is_tensor(arguments[n]) for n in known[prepass.POINTERS :])
    types = struct.Struct(prepass.LAYOUT)
    assert types.size % 8 == 0
    types.pack(*made[0][2][prepass.POINTERS :])
    # V's kernels are compiled once, whatever is done to Q and K.
    for *_, given, _, _ in made[2:]:
        alone = dict(given["defined"])
        assert alone["NORM"] == 0 and alone["ANGLES"] == prepass.ABSENT and alone["GROUPS"] == 1
    # In the order of `Prepared`, which `prepare` relies on.
    order = ("q_codes", "q_scale", "q_bound", "k_codes", "k_scale", "k_bound", "v_codes")
    order += ("v_scale", "v_offset", "v_sum", "shift")
    for name_of, tensor in zip(order, fields, strict=True):
        # Swizzled copies come without V's sums.
        assert tensor is (None if name_of == "v_sum" else arguments[name_of])
    assert (fields[6] is None) == (mode == "exact")
    assert arguments["q_weight"] is p.q_weight and arguments["sin"] is p.sin
    assert (
        arguments["keys"] == 3000 and arguments["heads"] == HEADS and arguments["first"] == p.first
    )
    assert arguments["v_l"] == D and arguments["k_h"] == 3000 * D
    assert (arguments["k_inverse"] is None) == (p.norm != "token")
    started = [kernel._name for kernel, *_ in made]
    assert started[:2] == ["survey", "pack_rows"]
    more = {"exact": [], "fp8": ["pack_values"], "int8": ["hold_values"]}[mode]
    assert started[2:] == [*more, "finish_values"] * (mode != "exact")
    assert arguments["v_held"] == 3


@pytest.mark.parametrize(
    ("keys", "held", "once"),
    [(198 * 3 * 128, 3, True), (198 * 3 * 128 + 1, 3, False), (300, 2, True), (300, 1, False)],
)
def test_integers_are_read_once_where_a_head_is_three_quarters_of_what_runs_at_once(
    monkeypatch, keys, held, once
):
    made, _ = launches(monkeypatch, "int8", NOTHING, heads=2, b=1, keys=keys, held=held)
    started = {kernel._name: programs for kernel, programs, *_ in made}
    assert ("hold_values" in started) == once
    assert ("see_values" in started) == ("pack_values" in started) == (not once)
    blocks = prepass.count(keys)
    if once:
        assert started["hold_values"] == 2 * prepass.count(blocks, held)
    else:
        assert started["see_values"] == 2 * prepass.count(blocks, prepass.VALUE_TILES)


@pytest.mark.parametrize(
    ("optin", "processor", "held"),
    [
        (232448, 233472, {64: 3, 128: 3}),
        (166912, 167936, {64: 2, 128: 2}),
        (101376, 102400, {64: 1, 128: 1}),
    ],
)
def test_blocks_that_hold_values_run_beside_others(monkeypatch, optin, processor, held):
    """Of a GPU's multiprocessor: shared memory of a block at most, and all of it."""

    class Gpu:
        shared_memory_per_block_optin = optin

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)
    for d in prepass.WIDTHS:
        prepass._held.cache_clear()
        n = prepass._held(torch.device("cuda"), d)
        prepass._held.cache_clear()
        assert n == held[d]
        blocks = prepass.RESIDENT_THREADS // (prepass.THREADS_PER_CHANNEL * d)
        assert blocks * (prepass.held_bytes(d, n) + prepass.DRIVER_BYTES + 64) <= processor
        # A tile's codes and sums are staged where it was.
        assert prepass.values_bytes(d) <= 2 * prepass.TILE * d


def test_norms_come_so_far_ahead_that_all_blocks_have_other_work(monkeypatch):
    """And no further than the L2 cache of an H200 reaches, of which half counts."""
    shape = {"b": 1, "h": 40, "heads": 40, "queries": 32760, "keys": 32760}
    arguments = launches(monkeypatch, "exact", prologue("token"), **shape)[0][1][2]
    known = dict(zip(fields_of(prepass.source("survey.cu"), "Params"), arguments, strict=True))
    each = prepass.TILE * prepass.WARP // (4 * D) + prepass.count(40, prepass.K_HEADS)
    assert (known["k_lag"] - 1) * each >= 264
    assert known["k_lag"] * prepass.TILE * 40 * D * 2 <= 25e6
    items = 40 + 256 * prepass.count(40, prepass.Q_HEADS) + (256 + known["k_lag"]) * each
    assert known["row_items"] == items


def test_blocks_have_room_on_every_gpu():
    """99 KiB are what a block may have on SM86, 89 and 120."""
    for d in prepass.WIDTHS:
        room = max(prepass.rows_bytes(d, prologue("token", d)), prepass.values_bytes(d))
        assert room + prepass.EXCHANGED_BYTES <= 101376
    # A block each has one KiB more of the driver's.
    most = prepass.rows_bytes(D, prologue("token")) + prepass.EXCHANGED_BYTES + 1024
    assert 2 * most <= 228 * 1024


def test_what_does_not_fit_is_left_to_triton(monkeypatch):
    class Somewhere(torch.Tensor):
        """A tensor that says it is on a GPU."""

        device = torch.device("cuda", 0)

    class Gpu:
        shared_memory_per_block_optin = 232448

    monkeypatch.setattr(prepass.nvrtc, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Gpu)

    def fits(q, mode="exact", p=NOTHING, v=None, plain=False):
        q, v = (x.as_subclass(Somewhere) for x in (q, q if v is None else v))
        return prepass.fits(q, q, v, MODES[mode], p, plain)

    whole = torch.zeros(1, 2, 9, 128, dtype=torch.float16)
    wide = torch.zeros(1, 2, 9, 256, dtype=torch.float16)
    assert fits(whole) and fits(whole.transpose(1, 2).contiguous().transpose(1, 2))
    assert fits(wide[..., :128]) and fits(whole.expand(3, 2, 9, 128))
    assert not fits(wide[..., ::2]) and not fits(wide[..., 4:132]) and not fits(wide)
    assert not fits(torch.zeros(1, 2, 9, 132, dtype=torch.float16)[..., :128])
    # V is read where the mode stores it.
    assert fits(whole, "exact", v=wide[..., ::2]) and not fits(whole, "fp8", v=wide[..., ::2])
    narrow = torch.zeros(1, 2, 9, 64, dtype=torch.float16)
    assert fits(narrow, plain=True) and not fits(narrow)
    angles = torch.zeros(9, 64)
    assert fits(whole, p=Prologue(cos=angles, sin=angles))
    assert not fits(whole, p=Prologue(cos=angles, sin=angles.half()))
    apart = torch.zeros(9 * 64 + 1)[1:].view(9, 64)
    assert not fits(whole, p=Prologue(cos=apart, sin=apart))
    Gpu.shared_memory_per_block_optin = 65536
    assert not fits(whole, p=prologue("token")) and fits(whole)
    monkeypatch.setattr(prepass.nvrtc, "missing", lambda: "no")
    assert not fits(whole)
