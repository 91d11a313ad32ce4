"""The CUDA C++ of `quantize_rows`: the layouts that it rests on, its cuts, and its machine code."""

import cProfile
import itertools
import re

import pytest
import torch
from comfy_kitchen.tensor.int8_utils import _build_hadamard

from lowbit.ops import launch, registry
from lowbit.ops.cuda import kernel as cuda_kernel
from lowbit.ops.quantize_rows import OP, Prologue, cuda, interleave, triton

from .cuda.compiled import compiled, disassembled

LANE = torch.arange(32)
# Lane 4 G + T of a warp, as PTX names them.
G, T = LANE >> 2, LANE & 3
X = torch.ones(1, dtype=torch.bfloat16)
LAYER = Prologue("layer", scale=X, shift=X)
GELU = Prologue(activation="gelu_tanh")


def left(registers: list, columns: int) -> torch.Tensor:
    """The left operand [16, columns] whose registers these are: pairs of 16 bits, or TF32."""
    matrix = torch.full((16, columns), torch.nan)
    for r, values in enumerate(registers):
        for h, value in enumerate(values):
            column = 2 * T + h + 8 * (r >> 1) if columns == 16 else T + 4 * (r >> 1)
            matrix[G + 8 * (r & 1), column] = value
    return matrix


def right(registers: list, rows: int) -> torch.Tensor:
    """The right operand [rows, 8] whose registers these are."""
    matrix = torch.full((rows, 8), torch.nan)
    for r, values in enumerate(registers):
        for h, value in enumerate(values):
            matrix[2 * T + h + 8 * r if rows == 16 else T + 4 * r, G] = value
    return matrix


def accumulator(matrix: torch.Tensor) -> list[torch.Tensor]:
    """The registers in which a product [16, 8] comes."""
    return [matrix[G + 8 * (r >> 1), 2 * T + (r & 1)] for r in range(4)]


def test_two_products_without_an_exchange_are_the_rotation():
    """As rotate.cu does them: each lane loads 8 columns and ends with the same 8."""
    same = ((G >> 1) ^ T) & ((G >> 2) ^ (T >> 1)) & 1
    even = same ^ (G & 1)
    s, e, o = (1.0 - 2.0 * bit for bit in (same, even, even ^ 1))
    wide = left([(s, s), (e, o), (e, o), (s, s)], 16)
    steps = (left([(s,), (e,), (s,), (o,)], 8), left([(e,), (s,), (o,), (s,)], 8))
    columns = ((LANE & 24) | (LANE & 3) << 1 | (LANE >> 2 & 1)) * 8
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    p = [x[columns + i] for i in range(8)]
    halves = [right([(p[n], p[n + 1]), (p[n + 2], p[n + 3])], 16) for n in (0, 4)]
    c = [accumulator(wide @ half) for half in halves]
    d = []
    for i in range(2):
        parts = (right([(c[n][2 * i],), (c[n][2 * i + 1],)], 8) for n in range(2))
        d.append(accumulator(sum(h @ part for h, part in zip(steps, parts, strict=True))))
    # Split in BF16, the second product has the right operand of the first kind.
    again = [[(c[0][2 * i], c[0][2 * i + 1]), (c[1][2 * i], c[1][2 * i + 1])] for i in range(2)]
    for i in range(2):
        torch.testing.assert_close(
            accumulator(wide @ right(again[i], 16)), d[i], rtol=1e-5, atol=1e-5
        )
    got = torch.full((256,), torch.nan)
    for i in range(8):
        got[columns + i] = d[i >> 1 & 1][(i >> 2) * 2 + (i & 1)] / 16
    torch.testing.assert_close(got, x @ _build_hadamard(256), rtol=1e-5, atol=1e-5)


def test_products_give_the_moments_of_a_row():
    """Squares stand on the diagonal of words with themselves, in rows of 8 lanes."""
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    y = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))
    words = torch.full((16, 8), torch.nan)
    for h in range(2):
        words[G, 2 * T + h], words[G + 8, 2 * T + h] = x[:, h], y[:, h]
    squares = 0.0
    for place, word in ((0, x), (2, y)):
        operand = torch.full((8, 8), torch.nan)
        for h in range(2):
            operand[2 * T + h, G] = word[:, h]
        found = accumulator(words @ operand)
        squares += torch.where(
            T == G >> 1, torch.where(G & 1 == 1, found[place + 1], found[place]), 0.0
        ).sum()
    torch.testing.assert_close(squares, x.square().sum() + y.square().sum())


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 1000, 4096, 32760, 75600, 2**31 - 1])
def test_tokens_are_divided_by_without_a_division(tokens):
    magic, bits = cuda._magic(tokens)
    assert magic < 2**32
    for i in (0, 1, tokens - 1, tokens, 5 * tokens - 1, 5 * tokens, 2**31 - 1, 2**30 + 12345):
        if i < 2**31:
            assert (2 * i * magic >> 32) >> bits == i // tokens


@pytest.mark.parametrize("shared", [False, True])
def test_every_row_is_covered_by_few_warps(shared):
    for groups in range(1, cuda.K_MAX // 256 + 1):
        for words in (4, 8, 12, 40):
            cut = cuda.cut_of(groups, shared, words)
            assert groups <= cut.warps * cut.blocks < groups + cut.blocks
            assert cut.threads <= cuda.MOST_THREADS
            assert cut.teams <= cuda.MOST_TEAMS


def test_a_modulation_and_rows_ahead_fit_on_hopper():
    room = 227 * 1024 - cuda.EXCHANGED_BYTES
    for groups in range(1, cuda.K_MAX // 256 + 1):
        for dtype, words in ((BF16, 4), (torch.float32, 8)):
            for rotated, rows in itertools.product((False, True), (0, 16, 32)):
                cut = cuda.cut_of(groups, True, words, rotated, rows)
                assert cut.resident * cuda.shared_bytes(cut, 256 * groups, dtype) <= room


def test_lanes_store_columns_where_interleave_puts_them():
    """As `place_of` and `store` in rows.cu have it, for 8 columns in a row."""
    k = 2 * 256
    got = torch.full((k,), -1)
    for column in range(0, k, 8):
        at = (column & ~127) + (column >> 3 & 3) * 32 + (column >> 5 & 3) * 4
        for h in range(2):
            u = torch.arange(column + 4 * h, column + 4 * h + 4)
            got[at + 16 * h : at + 16 * h + 4] = u[[1, 0, 3, 2]]
    assert torch.equal(got, interleave(torch.arange(k)[None])[0])


def layout_of(kernel) -> str:
    return f"{kernel._pointers}P{kernel._layout}"


def test_cuts_of_wide_models_are_those_that_were_measured():
    shared = {1536: (1, 6, 15, 1), 3072: (2, 6, 8, 1), 5120: (4, 5, 5, 1), 8960: (5, 7, 3, 1)}
    shared |= {12288: (8, 6, 2, 1), 13824: (8, 7, 2, 1), 14336: (8, 7, 2, 1)}
    direct = {5120: (4, 5, 1, 6), 12288: (8, 6, 1, 3), 13824: (9, 6, 1, 3), 14336: (14, 4, 1, 2)}
    for wanted, is_shared in ((shared, True), (direct, False)):
        assert {k: cuda.cut_of(k // 256, is_shared, 4) for k in wanted} == wanted
    assert cuda.cut_of(12, True, 4, False) == (4, 3, 4, 2)
    assert cuda.cut_of(12, True, 8, False) == cuda.cut_of(12, True, 8)
    assert cuda.cut_of(12, True, 4, True, 32) == (2, 6, 4, 2)
    assert cuda.cut_of(12, True, 4, True, 33) == (2, 6, 8, 1)
    assert cuda.cut_of(12, False, 4, True, 32) == cuda.cut_of(12, False, 4)


def test_parameters_are_laid_out_as_in_the_source():
    struct = re.search(r"struct Params \{(.*?)\};", cuda.source(), re.S)[1]
    letters = {"long long": "q", "u32": "I", "float": "f"}
    layout = ""
    for declaration in filter(None, map(str.strip, struct.split(";"))):
        kind, names = re.match(
            r"(long long|u32|float|const \w+\*|\w+\*) (.*)", declaration
        ).groups()
        for name in names.split(","):
            count = re.search(r"\[(\d+)\]", name)
            layout += ("P" if kind.endswith("*") else letters[kind]) * int(count[1] if count else 1)
    wanted = "".join(
        letter * int(count or 1)
        for count, letter in re.findall(r"(\d*)([PqIf])", layout_of(cuda.KERNEL))
    )
    assert layout == wanted


# (rows of K, dtype, stored, prologue, rotated, shared) that are compiled for a GPU, and the GPUs.
HOPPER = (9, 0)
BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8
BUILDS = [
    *((HOPPER, k, BF16, INT8, LAYER, True, True) for k in (5120, 13824)),
    (HOPPER, 13824, BF16, INT8, GELU, True, False),
    *((HOPPER, k, BF16, FP8, LAYER, False, True) for k in (3072, 5120)),
    (HOPPER, 16384, torch.float32, INT8, LAYER, True, True),
    (HOPPER, 1792, torch.float16, INT8, Prologue(), True, False),
    (HOPPER, 8960, torch.float32, FP8, Prologue("rms", weight=X), True, False),
    *((capability, 5120, BF16, INT8, LAYER, True, True) for capability in ((8, 0), (12, 0))),
    *((capability, 5120, BF16, INT8, GELU, True, False) for capability in ((8, 6), (10, 0))),
    ((8, 9), 5120, BF16, FP8, GELU, True, False),
]


@pytest.mark.parametrize(
    ("capability", "k", "dtype", "stored", "prologue", "rotated", "shared"),
    BUILDS,
    ids=[f"{i}-sm{major}{minor}-{k}" for i, ((major, minor), k, *_) in enumerate(BUILDS)],
)
def test_kernel_keeps_a_row_in_registers(
    capability, k, dtype, stored, prologue, rotated, shared, tmp_path
):
    modulation = (prologue.weight, prologue.bias, prologue.scale, prologue.shift)
    words = cuda.words_of(dtype, modulation, shared)
    cut = cuda.cut_of(k // 256, shared, words, rotated)
    names = cuda.defined(dtype, stored, rotated, False, prologue, cut, k, shared)
    code = compiled(cuda.source(), cuda_kernel.options(capability, names))
    sass, usage = disassembled(code, tmp_path)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    assert registers * cut.threads * cut.resident <= cuda.REGISTERS
    # Two numbers of 4 bytes may be put aside, where GPUs before and after Hopper take more.
    assert stack <= (8 if capability == HOPPER else 64)
    # The first row ahead, and each next one.
    copies = cut.blocks * dtype.itemsize if shared else 0
    assert len(re.findall(r"LDGSTS\.E\.[A-Z.]*128", sass)) == copies
    assert shared or len(re.findall(r"LDG\.E\.[A-Z.]*128", sass)) >= cut.blocks
    assert bool(re.search(r"HMMA\.1688\.F32\.TF32", sass)) == (rotated and prologue != Prologue())


@pytest.mark.parametrize("capability", [(8, 9), HOPPER])
@pytest.mark.parametrize("k", [3072, 13824])
def test_interleaved_rows_let_the_product_be_set_up_beside_them(capability, k, tmp_path):
    cut = cuda.cut_of(k // 256, False, 4)
    names = cuda.defined(BF16, FP8, False, False, Prologue(), cut, k, False, True)
    sass, usage = disassembled(
        compiled(cuda.source(), cuda_kernel.options(capability, names)), tmp_path
    )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    assert stack == 0 and registers * cut.threads * cut.resident <= cuda.REGISTERS
    # Before anything is read; GPUs before Hopper have no such launch.
    trigger = re.search(r"\bPREEXIT\b", sass)
    assert (trigger is not None) == (capability == HOPPER)
    if trigger:
        assert trigger.start() < re.search(r"\bLDG\b", sass).start()
    # Two words for each 8 columns.
    assert len(re.findall(r"\bSTG\.E ", sass)) == 2 * cut.blocks + 1
    names = cuda.defined(BF16, FP8, False, False, Prologue(), cut, k, False)
    sass, _ = disassembled(
        compiled(cuda.source(), cuda_kernel.options(capability, names)), tmp_path
    )
    assert "PREEXIT" not in sass


@pytest.fixture
def started(monkeypatch):
    """What was launched: (blocks, arguments, options) of each call."""
    found = []

    class Fake(cuda_kernel.Loaded):
        def __init__(self, options):
            self.options = options

        def start(self, programs, arguments):
            found.append((programs, list(arguments), self.options))

    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(
        cuda_kernel.CudaKernel, "load", lambda self, device, **options: Fake(options)
    )
    monkeypatch.setattr(cuda, "_processors", lambda device: 4)
    monkeypatch.setattr(cuda, "_room", lambda device: 227 * 1024)
    return found


def test_second_call_is_only_launched(started, monkeypatch):
    for value in (1.0, 2.0):
        x = torch.full((3, 512), value)
        stored, scale = cuda.run(x, INT8, True)
        assert (stored.shape, scale.shape) == ((3, 512), (3, 1))
        programs, arguments, options = started[-1]
        assert (programs, options["threads"], options["shared_bytes"]) == (3, 32, 0)
        assert arguments[0] is x and arguments[1] is stored and arguments[2] is scale
        assert arguments[3:8] == [None] * 5
        # Nothing of a call is prepared anew.
        monkeypatch.setattr(cuda, "defined", None)
    assert len(started) == 2


def test_modulation_of_many_rows_is_shared(started):
    scale, shift = torch.ones(2, 256), torch.ones(256)
    prologue = Prologue("layer", scale=scale, shift=shift)
    least = 4 * cuda.SHARED_ROWS
    for m, shared in ((2 * least - 2, False), (2 * least, True)):
        cuda.run(torch.ones(m, 256), INT8, True, prologue)
        programs, arguments, options = started[-1]
        assert dict(options["defined"])["SHARED"] == shared
        cut = cuda.cut_of(1, shared, 8)
        assert programs == (4 if shared else m)
        assert options["shared_bytes"] == (cuda.shared_bytes(cut, 256, torch.float32) * shared)
        assert arguments[6] is scale and arguments[7] is shift
        assert arguments[8:11] == [256, 256, 0]
        assert arguments[15:17] == ([least, 2] if shared else [least - 1, m])


def test_modulation_is_not_shared_where_a_block_has_no_room(started, monkeypatch):
    monkeypatch.setattr(cuda, "_room", lambda device: 99 * 1024)
    for k, shared in ((2048, True), (8192, False)):
        prologue = Prologue("layer", scale=torch.ones(k), shift=torch.ones(k))
        cuda.run(torch.ones(4 * cuda.SHARED_ROWS, k, dtype=BF16), INT8, True, prologue)
        assert dict(started[-1][2]["defined"])["SHARED"] == shared
        assert started[-1][2]["shared_bytes"] <= 99 * 1024


def test_rows_that_cannot_be_read_16_bytes_at_a_time_are_copied(started):
    for x in (torch.ones(512, 3).t(), torch.ones(3, 513)[:, 1:], torch.ones(3, 514)[:, :512]):
        for _ in range(2):
            cuda.run(x, INT8, True)
            copy = started[-1][1][0]
            assert copy is not x and copy.is_contiguous() and torch.equal(copy, x)


def test_auto_takes_it_on_hopper_alone(monkeypatch):
    monkeypatch.setattr(cuda.nvrtc, "missing", lambda: None)
    registry._self_test.cache_clear()
    device = torch.device("cuda", 0)
    backend = next(b for b in registry.backends(OP) if b.name == "cuda")
    for has, taken in (((8, 9), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(registry, "capability", lambda device, has=has: has)
        call = registry.Call("int8_rotated", device, 0, 5120)
        assert registry.unmet(backend.needs, call) is None
        assert (registry._unmeasured(backend.needs, call) is None) == taken
    call = registry.Call("int8", device, 0, 1000)
    assert registry.unmet(backend.needs, call) == "K=1000 is not a multiple of 256"
    registry._self_test.cache_clear()


def test_rounding_alone_is_triton_s_where_there_is_triton():
    """By rank: both can."""
    ranks = {}
    for backend in registry.backends(OP):
        for scheme in backend.needs.schemes:
            ranks[backend.name, scheme] = backend.rank
    for kind in ("int8", "fp8"):
        assert ranks["triton", f"{kind}_bare"] < ranks["cuda", f"{kind}_bare"]
        for suffix in ("", "_rotated"):
            assert ranks["cuda", kind + suffix] < ranks["triton", kind + suffix]
    assert ranks["cuda", "fp8_interleaved"] < ranks["triton", "fp8_interleaved"]


def test_a_call_runs_no_more_python_than_triton_s(started, monkeypatch):
    """Up to the launch itself, once prepared."""
    pytest.importorskip("triton", reason="Triton, whose kernel is named here, is missing")
    monkeypatch.setattr(launch, "launch", lambda kernel, *rest: kernel)
    monkeypatch.setattr(launch, "again", lambda *arguments: None)
    monkeypatch.setattr(triton, "capability", lambda device: (9, 0))
    x = torch.ones(3, 512)
    counts = {}
    for backend in (cuda, triton):
        for _ in range(3):
            profile = cProfile.Profile()
            profile.runcall(backend.run, x, INT8, True, GELU)
        counts[backend] = sum(entry.callcount for entry in profile.getstats())
    assert counts[cuda] <= counts[triton]
