"""The CUDA C++ backend of `quantize_rows`: how its kernel is cut, compiled and launched."""

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch

from ..cuda import FOLDER, nvrtc
from ..cuda.kernel import CudaKernel
from ..launch import ALIGNMENT
from ..registry import Backend, Needs, register
from ..replay import empty, launch, replayed
from . import LIMITS, NOTHING, OP, ROTATION
from .prologue import Prologue, rows_of

SOURCES = (
    FOLDER / "ampere.cu",
    FOLDER / "vector.cu",
    *(Path(__file__).with_name("kernels") / name for name in ("rotate.cu", "rows.cu")),
)
K_MAX = 16384
HOPPER, BEYOND = (9, 0), (9, 1)
# As the source numbers them.
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ABSENT = -1
NORMS = {None: 0, "layer": 1, "rms": 2}
WARP = 32
# Of a multiprocessor: registers, blocks; of a block: barriers for teams, threads.
REGISTERS, MOST_BLOCKS, MOST_TEAMS, MOST_THREADS = 65536, 32, 15, 1024
# Groups of 256 columns of a warp -> registers of a thread: measured on an H200, where those of a
# bf16 row fit without a modulation of their own. Where it is SHARED, rows that are rotated take
# fewer, but more teams were slower.
DIRECT = {1: 48, 2: 48, 3: 56, 4: 64, 5: 80, 6: 72}
SHARED = {1: 80, 2: 80, 3: 80, 4: 80, 5: 96, 6: 128, 7: 128}
MOST_REGISTERS = 168
# Of these, what is for 8 columns before they are computed with.
DIRECT_WORDS, SHARED_WORDS = 8, 4
# Rows for each multiprocessor from which on a modulation is joined in shared memory: with 32 that
# was measured to be 12% faster, with 8 a team would have one row.
SHARED_ROWS = 16
# That a thread has of a group.
COLUMNS = 8
# Two factors in float32 for a column.
JOINED_BYTES = 8
# Of a block, beside these: what warps of a team tell each other, at most, and the driver's.
EXCHANGED_BYTES = 4096
# Rows of a team up to which two blocks with half of the teams each are faster, where rows are
# rotated: one works while the other begins.
FEW_ROWS = 4


class Cut(NamedTuple):
    """How a row is divided: see rows.cu."""

    warps: int
    blocks: int
    teams: int
    resident: int

    @property
    def threads(self) -> int:
        return self.warps * self.teams * WARP


# Groups of a row that is not rotated -> what was measured to be faster, with a shared modulation,
# than what `cut_of` finds.
PLAIN_SHARED = {12: Cut(4, 3, 4, 2)}


def cut_of(groups: int, shared: bool, words: int, rotated: bool = True, rows: int = 0) -> Cut:
    """Return the cut for rows of so many groups of 256 columns.

    words: registers that hold what was read for 8 columns, of x and, where it is not shared, of
    the modulation. rows: for each multiprocessor, 0 for many.
    """
    if shared and not rotated and words == SHARED_WORDS and groups in PLAIN_SHARED:
        return PLAIN_SHARED[groups]
    cut = _most_in_flight(groups, shared, words)
    if shared and rotated and 0 < rows <= FEW_ROWS * cut.teams and cut.teams % 2 == 0:
        return cut._replace(teams=cut.teams // 2, resident=2 * cut.resident)
    return cut


def _most_in_flight(groups: int, shared: bool, words: int) -> Cut:
    cuts = [cut for b in (SHARED if shared else DIRECT) if (cut := _cut(groups, b, shared, words))]
    # Most rows in flight for each group that a team has room for, then most for a warp.
    return max(cuts, key=lambda c: (c.teams * c.resident / (c.warps * c.blocks), c.blocks))


def _cut(groups: int, blocks: int, shared: bool, words: int) -> Cut | None:
    """Return the cut for so many groups of each warp, or None where its threads hold no more."""
    known, counted = (SHARED[blocks], SHARED_WORDS) if shared else (DIRECT[blocks], DIRECT_WORDS)
    registers = known + blocks * max(0, words - counted)
    warps = -(-groups // blocks)
    if registers > MOST_REGISTERS or warps * WARP > MOST_THREADS:
        return None
    most = max(1, REGISTERS // (warps * WARP * registers))
    if not shared:
        return Cut(warps, blocks, 1, min(most, MOST_BLOCKS))
    return Cut(warps, blocks, min(most, MOST_TEAMS), 1)


def shared_bytes(cut: Cut, k: int, x: torch.dtype) -> int:
    """Return the shared memory of a block: the joined modulation, and a row ahead of each team."""
    return JOINED_BYTES * k + cut.threads * cut.blocks * COLUMNS * x.itemsize


def words_of(x: torch.dtype, modulation: tuple[torch.Tensor | None, ...], shared: bool) -> int:
    """Return the registers that hold what is read for 8 columns."""
    read = (x,) if shared else (x, *(t.dtype for t in modulation if t is not None))
    return sum(2 * dtype.itemsize for dtype in read)


def source() -> str:
    """Return the CUDA C++ source, of all its files."""
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


# The fields of `struct Params`.
KERNEL = CudaKernel("quantize_rows", 8, "3q6I2f3I4x", source)


def run(
    x: torch.Tensor,
    dtype: torch.dtype,
    rotated: bool,
    prologue: Prologue = NOTHING,
    input_scale: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored, scale) as `quantize_rows` describes them."""
    p = prologue
    steps = (p.norm, p.eps, p.weight, p.bias, p.scale, p.shift, p.activation)
    return _run(x, dtype, rotated, input_scale, interleaved, *steps)


@replayed
def _run(x, dtype, rotated, input_scale, interleaved, *steps) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `run` does; steps: the fields of a prologue."""
    p = Prologue(*steps)
    m, k = x.shape
    stored = empty((m, k), dtype, x.device)
    row_scale = input_scale
    if input_scale is None:
        row_scale = empty((m, 1), torch.float32, x.device)
    x = _readable(x)
    modulation = tuple(
        None if t is None else _readable(t) for t in (p.weight, p.bias, p.scale, p.shift)
    )
    scale, shift = modulation[2:]
    stride_scale, tokens_scale = rows_of(scale, m)
    stride_shift, tokens_shift = rows_of(shift, m)
    tokens = math.gcd(tokens_scale, tokens_shift)
    processors = _processors(x.device)
    shared = any(t is not None for t in modulation) and tokens >= SHARED_ROWS * processors

    def cut_for(shared: bool) -> Cut:
        words = words_of(x.dtype, modulation, shared)
        return cut_of(k // ROTATION, shared, words, rotated, -(-m // processors))

    cut = cut_for(shared)
    if shared and shared_bytes(cut, k, x.dtype) + EXCHANGED_BYTES > _room(x.device):
        shared, cut = False, cut_for(False)
    parts = max(1, processors * cut.resident * tokens // m) if shared else m
    magic_scale, bits_scale = _magic(tokens_scale)
    magic_shift, bits_shift = _magic(tokens_shift)
    arguments = (
        *(x, stored, row_scale, input_scale, *modulation),
        *(x.stride(0), stride_scale, stride_shift),
        *(magic_scale, magic_shift, bits_scale, bits_shift, tokens, parts),
        *(p.eps, LIMITS[dtype], 0, 0, 0),
    )
    static = input_scale is not None
    options = {
        "threads": cut.threads,
        "shared_bytes": shared_bytes(cut, k, x.dtype) if shared else 0,
        "defined": defined(x.dtype, dtype, rotated, static, p, cut, k, shared, interleaved),
    }
    launch(KERNEL, parts * (m // tokens) if shared else m, arguments, options, None, x.device)
    return stored, row_scale


def defined(
    x: torch.dtype,
    stored: torch.dtype,
    rotated: bool,
    static: bool,
    p: Prologue,
    cut: Cut,
    k: int,
    shared: bool,
    interleaved: bool = False,
) -> tuple[tuple[str, int], ...]:
    """Return the names that rows.cu wants set, with their values."""
    dtypes = {
        name: ABSENT if t is None else DTYPES[t.dtype]
        for name, t in zip(
            ("WEIGHT", "BIAS", "SCALE", "SHIFT"), (p.weight, p.bias, p.scale, p.shift), strict=True
        )
    }
    # A bare rotation waits for memory: the more exact product costs nothing. What was float32 has
    # been rounded to TF32 for the first product already.
    parts = 2 if p == NOTHING or x == torch.float32 else 1
    flags = {
        **{"X": DTYPES[x], "FP8": int(stored != torch.int8), "GROUPS": k // ROTATION},
        **{"WARPS": cut.warps, "BLOCKS": cut.blocks, "TEAMS": cut.teams, "RESIDENT": cut.resident},
        **{"ROTATE": int(rotated), "PARTS": parts, "NORM": NORMS[p.norm]},
        **{"GELU": int(p.activation is not None), "STATIC": int(static), "SHARED": int(shared)},
        "INTERLEAVE": int(interleaved),
    }
    return tuple((flags | dtypes).items())


def _readable(t: torch.Tensor) -> torch.Tensor:
    """Return t, or a copy where its rows are not contiguous or start where no 16 bytes do."""
    row_bytes = t.stride(0) * t.element_size() if t.dim() == 2 else 0
    if t.stride(-1) == 1 and row_bytes % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _magic(tokens: int) -> tuple[int, int]:
    """Return (magic, bits): i // tokens is (2 · i · magic >> 32) >> bits, for i below 2^31.

    Source: Granlund and Montgomery 1994, "Division by Invariant Integers using Multiplication",
    theorem 4.2.
    """
    bits = (tokens - 1).bit_length()
    return -(-(1 << (31 + bits)) // tokens), bits


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _room(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _missing(device: torch.device) -> str | None:
    """Return why kernels cannot be compiled for `device`, or None."""
    return nvrtc.missing()


def _register(rank: int, kind: str, suffixes: tuple[str, ...], capability: tuple[int, int]) -> None:
    needs = Needs(
        frozenset(f"{kind}{suffix}" for suffix in suffixes),
        devices=frozenset({"cuda"}),
        capability=capability,
        measured=(HOPPER, BEYOND),
        k_multiple=ROTATION,
        k_max=K_MAX,
        self_test=_missing,
    )
    register(Backend(OP, "cuda", rank, needs, run))


# E4M3 is no type of GPUs before 8.9. Rounding alone, in order, is Triton's: measured to be faster.
for _kind, _capability, _suffixes in (
    ("int8", (8, 0), ("", "_rotated")),
    ("fp8", (8, 9), ("", "_rotated", "_interleaved")),
):
    _register(5, _kind, _suffixes, _capability)
    _register(15, _kind, ("_bare",), _capability)
