"""The CUDA C++ of the Hopper backend: compiled by NVRTC where it is installed, and its schedule."""

import ctypes
import itertools
import re
import shutil
import subprocess

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

from ..cuda.compiled import compiled, disassembled, fields_of

CUDA = torch.device("cuda", 0)
HALF, FULL = torch.bfloat16, torch.float32
INT8 = hopper.Variant(torch.int8, torch.int8, HALF, bias=HALF)
FP8 = hopper.Variant(torch.float8_e4m3fn, torch.float8_e5m2, HALF, rows_b=False)
GATED = {"gate": HALF, "residual": HALF}
# What layers of models ask for, and everything at once.
VARIANTS = {
    "int8": INT8,
    "int8, h given": INT8._replace(term=HALF),
    "int8, h made": INT8._replace(term=HALF, down=True),
    "fp8, h made": FP8._replace(term=HALF, down=True),
    "gated, h made": INT8._replace(term=HALF, down=True, **GATED),
    "everything": hopper.Variant(
        *(torch.int8, torch.int8, FULL, True, True),
        **{"bias": FULL, "gate": FULL, "gates": True, "residual": FULL},
        **{"term": torch.float16, "down": True, "gelu": True},
    ),
}
# Bytes of the stack where registers do not suffice; the copying warp's, which waits anyway.
STACK = {"int8, h made": 8, "gated, h made": 40, "everything": 56}


@pytest.mark.parametrize("name", VARIANTS)
def test_kernel_uses_wgmma_and_no_local_memory(name, tmp_path):
    defined = VARIANTS[name].defined()
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
    assert fields_of(hopper.source(), "Params") == [name for name, _ in hopper.Params._fields_]


def test_every_variant_defines_what_is_listed():
    listed = hopper.source().partition("Defined from outside:")[2].partition("#define")[0]
    names = set(re.findall(r"\b[A-Z][A-Z_0-9]{2,}\b", listed))
    assert set(INT8.defined()) <= names


@pytest.mark.parametrize("down", [True, False])
def test_stages_fit_in_shared_memory(down):
    for bias, gate in itertools.product((None, HALF, FULL), repeat=2):
        variant = INT8._replace(bias=bias, gate=gate, term=HALF, down=down)
        stages = variant.stages
        assert hopper.shared_bytes(stages, down, variant.vectors) <= hopper.SHARED_BYTES
        # Beside a term of the most ranks there is a stage for a residual.
        assert stages * MADE_RANKS > (MADE_RANKS if down else MAX_RANKS)
    assert INT8._replace(gate=HALF, down=True).stages == hopper.STAGES


@pytest.mark.parametrize(("rows", "columns"), itertools.product((1, 16, 17, 40, 256), (1, 2, 54)))
@pytest.mark.parametrize("ahead", [0, 16, 144])
def test_order_has_every_tile_once_and_heads_before_those_that_wait(rows, columns, ahead):
    order = hopper.order(rows, columns, ahead)
    every = [row | column << 16 for row in range(rows) for column in range(columns)]
    assert sorted(order) == sorted(every)
    if ahead:
        place = {tile: i for i, tile in enumerate(order)}
        assert all(place[tile & 0xFFFF] <= i for i, tile in enumerate(order))


@pytest.mark.parametrize("down", [0, 1])
def test_kernel_finds_the_tiles_in_that_order(down, tmp_path):
    """Its own source, which is plain C++ but for two words, compiled for this machine."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    words = (f"-DGROUP={hopper.GROUP}", f"-DDOWN={down}", "-D__device__=", "-D__forceinline__=")
    file = tmp_path / "order.cpp"
    file.write_text(
        "#include <algorithm>\nusing std::max, std::min;\n"
        + (hopper.FOLDER / "order.cu").read_text(encoding="utf-8")
        + """extern "C" void all(int* out, int tiles, int rows, int columns, int first) {
            for (int t = 0; t < tiles; ++t) out[t] = tile_at(t, rows, columns, first);
        }""",
        encoding="utf-8",
    )
    library = tmp_path / "order.so"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", *words, "-o", library, file]
    subprocess.run(command, check=True)
    every = ctypes.CDLL(str(library)).all
    for rows in (*range(1, 180), 256, 257, 591):
        for columns, ahead in itertools.product(
            (1, 2, 3, 20, 54), (16, 128, 144) if down else (0,)
        ):
            found = (ctypes.c_int * (rows * columns))()
            every(found, len(found), rows, columns, ahead)
            assert list(found) == hopper.order(rows, columns, ahead), (rows, columns, ahead)


def test_rows_of_b_come_so_that_sums_are_neighbours():
    """Of a thread's sums, columns 8 j + 2 t + e of wgmma, each eight are neighbouring rows of b."""
    rows = torch.arange(64).view(64, 1)
    there = rows.as_strided(*hopper.permuted(rows.shape, rows.stride())).reshape(-1)
    for t, part in itertools.product(range(4), range(2)):
        mine = [there[32 * part + 8 * j + 2 * t + e].item() for j in range(4) for e in range(2)]
        assert mine == list(range(32 * part + 8 * t, 32 * part + 8 * t + 8))


def test_what_a_map_cannot_describe_is_copied():
    storage = torch.zeros(1 + 8 * 64, dtype=torch.int8)
    for good in (storage[:512].view(8, 64), storage[:512].view(8, 64)[:, :48]):
        assert hopper._matrix(good) is good
    for bad in (storage[1:].view(8, 64), storage[:504].view(8, 63)[:, :48]):
        copy = hopper._matrix(bad)
        assert copy.stride(0) % 16 == 0 and torch.equal(copy, bad)
    narrow = torch.zeros(32, 1).half()
    assert hopper._matrix(narrow).stride() == (8, 1)
    assert hopper._matrix(narrow[:1]).stride() == (8, 1)
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


def test_what_the_kernel_does_not_take_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    a, one = torch.zeros(4, 16, dtype=torch.int8), torch.ones(1)
    term = torch.zeros(4, MAX_RANKS + 16).bfloat16(), torch.zeros(32, MAX_RANKS + 16).bfloat16()
    b = torch.zeros(32, 16, dtype=torch.int8)
    with pytest.raises(ValueError, match="hopper takes 192 ranks, not 208"):
        hopper.run(a, b, one, one, *[None] * 6, torch.bfloat16, term)
    with pytest.raises(ValueError, match="no zero point"):
        hopper.run(a, b, one, one, None, torch.zeros(4).int(), *[None] * 4, torch.bfloat16)
    with pytest.raises(ValueError, match="8388480 rows"):
        hopper.row_tiles(1 << 23)
    made = Down(torch.zeros(80, 16, dtype=torch.int8), torch.ones(80, 1)), term[1][:, :80]
    with pytest.raises(ValueError, match="hopper takes 64 ranks, not 80"):
        hopper.run(a, b, one, one, *[None] * 6, torch.bfloat16, made)


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
