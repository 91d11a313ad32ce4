"""The CUDA C++ of the Hopper backend: compiled by NVRTC where it is installed, and its schedule."""

import itertools
import re

import pytest
import torch

import lowbit.ops.linear  # noqa: F401, registers its backends
from lowbit.ops import registry
from lowbit.ops.scaled_mm import OP, hopper, scaled_mm
from lowbit.ops.scaled_mm.check import (
    MADE_RANKS,
    MANY_ROWS,
    MANY_ROWS_WITH_TERM,
    MAX_RANKS,
    Down,
    is_few,
)

from ..cuda.compiled import compiled, disassembled

CUDA = torch.device("cuda", 0)
BF16, FP32 = hopper.TYPES[torch.bfloat16], hopper.TYPES[torch.float32]
PLAIN = {
    **{"INTEGER": 1, "STAGES": 4, "LOW_RANK": 0, "FP16": 0, "DOWN": 0, "ROWS_A": 1, "ROWS_B": 1},
    **{"OUT": BF16, "BIAS": BF16, "GATE": 0, "RESIDUAL": 0, "GATES": 0, "GELU": 0, "POINT": 0},
}
# What layers of models ask for, and everything at once.
VARIANTS = {
    "int8": {},
    "int8, h given": {"LOW_RANK": 1},
    "int8, h made": {"LOW_RANK": 1, "DOWN": 1},
    "fp8, h made": {"INTEGER": 0, "LOW_RANK": 1, "DOWN": 1, "ROWS_B": 0},
    "gated, h made": {"GATE": BF16, "RESIDUAL": BF16, "LOW_RANK": 1, "DOWN": 1},
    "everything": {
        **{"LOW_RANK": 1, "DOWN": 1, "FP16": 1, "GELU": 1, "GATES": 1, "POINT": 1},
        **{"OUT": FP32, "BIAS": FP32, "GATE": FP32, "RESIDUAL": FP32},
    },
}
# Bytes of the stack where registers do not suffice; the copying warp's, which waits anyway.
STACK = {"gated, h made": 16, "everything": 48}


@pytest.mark.parametrize("name", VARIANTS)
def test_kernel_uses_wgmma_and_no_local_memory(name, tmp_path):
    defined = PLAIN | VARIANTS[name]
    code = compiled(hopper.source(), hopper.options(**defined))
    sass, usage = disassembled(code, tmp_path)
    stack = int(re.search(r"STACK:(\d+)\b.*LOCAL:0\b", usage)[1])
    assert stack <= STACK.get(name, 0)
    kind = "IGMMA" if defined["INTEGER"] else "QGMMA"
    assert re.search(rf"\b{kind}\.64x256", sass)
    assert bool(re.search(rf"\b{kind}\.64x64", sass)) == bool(defined["DOWN"])
    assert bool(re.search(r"\bHGMMA\.64x64", sass)) == bool(defined["LOW_RANK"])
    # Nothing makes the products wait for each other: one wait in the loop and one after it, for
    # each of the loops, and one for each quarter of a term.
    loops = 2 if defined["DOWN"] else 1
    assert sass.count("WARPGROUP.DEPBAR") == 2 * loops + 4 * defined["LOW_RANK"]


def test_parameters_are_laid_out_as_in_the_source():
    """Names and order of `struct Params`: ctypes and C lay out the same fields the same way."""
    struct = re.search(r"struct Params \{(.*?)\};", hopper.source(), re.S).group(1)
    struct = re.sub(r"//[^\n]*", "", struct)
    fields = [
        name.strip(" *")
        for declaration in struct.split(";")
        for name in re.sub(r"^\s*(const )?(float|void|long long|int)\b", "", declaration).split(",")
        if name.strip()
    ]
    assert fields == [name for name, _ in hopper.Params._fields_]


def test_all_that_machine_cu_wants_is_defined():
    a, row = torch.zeros(4, 16, dtype=torch.int8), torch.zeros(4, 1)
    defined = hopper._defined(a, (row, row), *[None] * 6, torch.bfloat16)
    assert {"STAGES", *defined} == set(PLAIN)


@pytest.mark.parametrize("projects", [True, False])
def test_stages_fit_in_shared_memory(projects):
    kinds = (torch.float32, torch.bfloat16)
    for vectors in itertools.chain.from_iterable(
        itertools.product(kinds, repeat=i) for i in (0, 3)
    ):
        stages = hopper.stages_of(projects, vectors)
        assert hopper.shared_bytes(stages, projects, vectors) <= hopper.SHARED_BYTES
        # A term of all ranks leaves a stage for a residual.
        assert stages >= 3 if projects else stages * MADE_RANKS > MAX_RANKS
    assert hopper.stages_of(True, (torch.float32, torch.bfloat16, torch.bfloat16)) == hopper.STAGES


@pytest.mark.parametrize(("rows", "columns"), itertools.product((1, 16, 17, 40, 256), (1, 2, 54)))
@pytest.mark.parametrize("ahead", [0, 1, 132])
def test_order_has_every_tile_once_and_heads_before_those_that_wait(rows, columns, ahead):
    order = hopper.order(rows, columns, ahead)
    every = [row | column << 16 for row in range(rows) for column in range(columns)]
    assert sorted(order) == sorted(every)
    if ahead:
        place = {tile: i for i, tile in enumerate(order)}
        assert all(place[tile & 0xFFFF] <= i for i, tile in enumerate(order))


def test_rows_of_b_come_so_that_sums_are_neighbours(monkeypatch):
    """Of a thread's sums (j, 2 t + e), columns of wgmma, each eight are neighbouring rows of b."""
    seen = []
    monkeypatch.setattr(hopper, "tensor_map", lambda x, box: seen.append((x, box)))
    b = torch.arange(64 * 128).view(64, 128).to(torch.int8)
    hopper._permuted(b)
    (parts, box), rows = seen[0], torch.arange(64)
    assert box == (8, 4, 4, 2, 128) and parts.data_ptr() == b.data_ptr()
    there = rows.unflatten(0, (-1, 4, 4, 2)).transpose(1, 2).reshape(-1)
    for t, part in itertools.product(range(4), range(2)):
        mine = [there[32 * part + 8 * j + 2 * t + e].item() for j in range(4) for e in range(2)]
        assert mine == list(range(32 * part + 8 * t, 32 * part + 8 * t + 8))


def test_what_a_map_cannot_describe_is_copied():
    storage = torch.zeros(1 + 8 * 64, dtype=torch.int8)
    for good in (storage[:512].view(8, 64), storage[:512].view(8, 64)[:, :48]):
        assert hopper._matrix(good) is good
    for bad in (storage[1:].view(8, 64), storage[:504].view(8, 63)[:, :48]):
        copy = hopper._matrix(bad)
        assert copy.is_contiguous() and torch.equal(copy, bad)
    assert hopper._matrix(storage[:48].as_strided((1, 48), (5, 1))).stride() == (48, 1)


def test_many_rows_and_few_ranks():
    assert is_few(MANY_ROWS - 1, 0) and not is_few(MANY_ROWS, 0)
    assert not is_few(MANY_ROWS_WITH_TERM, MAX_RANKS) and is_few(MANY_ROWS, MAX_RANKS + 1)


@pytest.mark.parametrize(
    ("few", "n", "name"), [(0, 64, "hopper"), (1, 64, "triton"), (0, 48, "triton")]
)
def test_auto_takes_it_for_many_rows_alone(monkeypatch, few, n, name):
    pytest.importorskip("triton", reason="Triton, whose backend is the alternative, is missing")
    monkeypatch.setattr(registry, "capability", lambda device: (9, 0))
    monkeypatch.setattr(registry, "_self_test", lambda test, device: None)
    registry.select.cache_clear()
    for op in (OP, "linear"):
        call = registry.Call("int8_row", CUDA, n, 512, few=bool(few))
        assert registry.select(op, call).name == name
    registry.select.cache_clear()


def test_another_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr(hopper, "capability", lambda device: (10, 0))
    assert "needs compute capability (9, 0), got (10, 0)" in hopper._missing(CUDA)


def test_too_many_ranks_are_refused():
    a, one = torch.zeros(4, 16, dtype=torch.int8), torch.ones(1)
    term = torch.zeros(4, MAX_RANKS + 16).bfloat16(), torch.zeros(32, MAX_RANKS + 16).bfloat16()
    b = torch.zeros(32, 16, dtype=torch.int8)
    with pytest.raises(ValueError, match="hopper takes 192 ranks, not 208"):
        hopper.run(a, b, one, one, *[None] * 6, torch.bfloat16, term)


def operands(rank: int = 16, k: int = 64):
    generator = torch.Generator().manual_seed(0)
    a, b, stored = (
        torch.randint(-9, 9, (rows, k), generator=generator).to(torch.int8)
        for rows in (5, 32, rank)
    )
    scales = [torch.rand(rows, 1, generator=generator) for rows in (5, 32, rank)]
    return a, b, *scales, stored, torch.randn(32, rank, generator=generator).half()


def test_first_product_of_a_term_is_made_where_a_backend_does_not():
    a, b, scale_a, scale_b, scale, stored, u = operands()
    shift = torch.arange(16.0)
    got = scaled_mm(
        *(a, b, scale_a, scale_b),
        low_rank=(Down(stored, scale, shift), u),
        out_dtype=torch.float32,
        backend="reference",
    )
    h = scaled_mm(a, stored, scale_a, scale, shift, out_dtype=u.dtype, backend="reference")
    rest = {"out_dtype": torch.float32, "backend": "reference"}
    want = scaled_mm(a, b, scale_a, scale_b, low_rank=(h, u), **rest)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stored": torch.zeros(16, 64)}, "down is torch.float32"),
        ({"stored": torch.zeros(16, 48, dtype=torch.int8)}, r"down is \[16, 48\]"),
        ({"scale": torch.ones(1)}, "scale is torch.float32"),
        ({"shift": torch.ones(16).half()}, "shift is torch.float16"),
        ({"u": torch.zeros(32, 15).half()}, r"u \[32, 15\]"),
        ({"u": torch.zeros(32, 16)}, "u torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    a, b, scale_a, scale_b, scale, stored, u = operands()
    given = {"stored": stored, "scale": scale, "shift": None, "u": u} | changed
    u = given.pop("u")
    with pytest.raises((TypeError, ValueError), match=message):
        scaled_mm(a, b, scale_a, scale_b, low_rank=(Down(**given), u), backend="reference")
