"""The Hopper backend of `scaled_mm`: CUDA C++, compiled by torch's NVRTC when first called."""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..cuda import HOPPER_OPTIONS, nvrtc
from ..cuda import source as cuda_source
from ..cuda.tensor_map import TensorMap, no_map, tensor_map
from ..registry import Backend, Needs, capability, register
from . import OP
from .check import MADE_RANKS, MAX_RANKS, Down, in_8_bits
from .reference import in_16_bits

HOPPER = (9, 0)
FOLDER = Path(__file__).with_name("kernels")
SOURCES = ("machine.cu", "epilogue.cu", "product.cu")
THREADS = 384
# Rows and columns of a tile, bytes of K of a stage.
TILE_M, TILE_N, STEP = 128, 256, 128
STAGES = 4
SHARED_BYTES = 227 * 1024
# A thread stores eight neighbouring columns of a result, four threads as many as there are here.
COLUMNS = 32
# Row tiles that share columns in the L2.
GROUP = 16
ALIGNMENT = 16
# As the source has them.
TYPES = {None: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# The two slots in which the next tiles are told; barriers of these and of the vectors.
TILES_BYTES = 2 * 4
BARRIERS = 2 * (2 + 1)
POINTERS = (
    *("order", "scale_a", "scale_b", "bias", "gate", "zero_point", "column_sum", "out", "h"),
    *("ready", "taken", "scale_down", "shift"),
)


class Params(ctypes.Structure):
    """The kernel's first parameter, `struct Params` in machine.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("stride_gate", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("m", "n", "steps", "ranks", "tiles", "gate_rows")),
    )


def source() -> str:
    """Return the CUDA C++ source, of all its files."""
    return cuda_source(*(FOLDER / name for name in SOURCES))


def options(**defined: int) -> tuple[str, ...]:
    """Return NVRTC's options; defined: what machine.cu lists."""
    return (*HOPPER_OPTIONS, *(f"-D{name}={int(value)}" for name, value in defined.items()))


def shared_bytes(stages: int, projects: bool, vectors: Iterable[torch.dtype]) -> int:
    """Return the shared memory of a block. vectors: the dtypes of those that stay for a tile."""
    stage = (TILE_M + TILE_N + (MADE_RANKS if projects else 0)) * STEP
    held = sum(TILE_N * dtype.itemsize for dtype in vectors)
    return stages * stage + held + TILES_BYTES + 8 * (2 * stages + BARRIERS)


def stages_of(projects: bool, vectors: Sequence[torch.dtype]) -> int:
    """Return how many stages there is room for."""
    fits = shared_bytes(STAGES, projects, vectors) <= SHARED_BYTES
    return STAGES if fits else STAGES - 1


def order(rows: int, columns: int, ahead: int = 0) -> list[int]:
    """Return the tiles, row | column << 16, in the order in which they are begun.

    In groups of rows that share columns in the L2. ahead: 0, or where other tiles wait for those of
    column 0: so many of these come first, the others a group before their rows.
    """
    groups = [range(i, min(i + GROUP, rows)) for i in range(0, rows, GROUP)]
    if not ahead:
        return [row | column << 16 for g in groups for column in range(columns) for row in g]
    first = max(ahead, GROUP)
    tiles = list(range(min(first, rows)))
    for i, group in enumerate(groups):
        later = groups[i + 1] if i + 1 < len(groups) else ()
        tiles += [row for row in later if row >= first]
        tiles += [row | column << 16 for column in range(1, columns) for row in group]
    return tiles


@functools.cache
def _order(rows: int, columns: int, ahead: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(order(rows, columns, ahead), dtype=torch.int32, device=device)


@functools.cache
def _kernel(device: int, shared: int, *defined: tuple[str, int]) -> nvrtc.Kernel:
    code = nvrtc.compile_source(source(), options(**dict(defined)))
    return nvrtc.Kernel(code, "product", shared)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x, or a copy where a row of it starts at no multiple of 16 bytes."""
    if x is None:
        return None
    apart = x.dim() == 2 and len(x) > 1 and x.stride(0) * x.element_size() % ALIGNMENT
    if x.data_ptr() % ALIGNMENT or apart:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """Return x [R, C] as a map can describe it: the stride of one row may be anything."""
    return _aligned(x if len(x) > 1 else x.as_strided(x.shape, (x.shape[1], 1)))


def _map(x: torch.Tensor, rows: int) -> TensorMap:
    """Return the map by which boxes of so many rows and 128 bytes come."""
    return tensor_map(x, (rows, STEP // x.element_size()))


def _permuted(x: torch.Tensor) -> TensorMap:
    """Return the map by which 256 rows of x come, in such an order that sums are neighbours.

    Of 32 rows, 8·i + 2·j + e arrives as 8·j + 2·i + e (i, j below 4, e below 2).
    """
    parts = x.unflatten(0, (-1, 4, 4, 2)).transpose(1, 2)
    return tensor_map(parts, (TILE_N // COLUMNS, 4, 4, 2, STEP // x.element_size()))


@dataclass(frozen=True)
class _Term:
    """A low-rank term as the kernel takes it, with what has to stay alive until the launch.

    h: given, or to be written to; u: both in 16 bits. down: where h is made within.
    """

    h: torch.Tensor
    u: torch.Tensor
    down: Down | None = None

    @property
    def maps(self) -> tuple[TensorMap, TensorMap, TensorMap]:
        down = no_map() if self.down is None else _map(self.down.stored, MADE_RANKS)
        return _map(self.h, TILE_M), _permuted(self.u), down


def _term(low_rank, a, scale_a, scale_b) -> _Term | None:
    if low_rank is None:
        return None
    h, u = low_rank
    if isinstance(h, Down) and len(h.stored) <= MADE_RANKS:
        rows = -(-len(a) // TILE_M) * TILE_M
        made = torch.empty((rows, MADE_RANKS), dtype=u.dtype, device=a.device)
        return _Term(made, _matrix(u), h._replace(stored=_matrix(h.stored)))
    if isinstance(h, Down):
        h = run(a, h.stored, scale_a, h.scale, h.shift, *[None] * 5, u.dtype)
    elif in_8_bits(low_rank):
        h, u = in_16_bits(low_rank, scale_a, scale_b)
    if pad := -h.shape[1] % (ALIGNMENT // 2):
        h, u = F.pad(h, (0, pad)), F.pad(u, (0, pad))
    return _Term(_matrix(h), _matrix(u))


def _defined(a, scales, bias, gate, residual, term, zero_point, activation, out_dtype) -> dict:
    """Return what machine.cu wants to be defined, but the stages."""
    dtypes = {"BIAS": bias, "GATE": gate, "RESIDUAL": residual}
    return {
        "INTEGER": a.dtype == torch.int8,
        "LOW_RANK": term is not None,
        "FP16": term is not None and term.u.dtype == torch.float16,
        "DOWN": term is not None and term.down is not None,
        **{name: x.numel() > 1 for name, x in zip(("ROWS_A", "ROWS_B"), scales, strict=True)},
        "OUT": TYPES[out_dtype],
        **{name: TYPES[None if x is None else x.dtype] for name, x in dtypes.items()},
        "GATES": gate is not None and gate.shape[0] > 1,
        "GELU": activation is not None,
        "POINT": zero_point is not None,
    }


def run(
    a,
    b,
    scale_a,
    scale_b,
    bias,
    zero_point,
    column_sum,
    activation,
    gate,
    residual,
    out_dtype,
    low_rank=None,
) -> torch.Tensor:
    """Return the product as `scaled_mm` describes it.

    Raises ValueError for a term of more than MAX_RANKS ranks.
    """
    if low_rank is not None and low_rank[1].shape[1] > MAX_RANKS:
        raise ValueError(
            f"scaled_mm: hopper takes {MAX_RANKS} ranks, not {low_rank[1].shape[1]}; name another "
            "backend, or none"
        )
    out = torch.empty((len(a), len(b)), dtype=out_dtype, device=a.device)
    a, b = _matrix(a), _matrix(b)
    # Named until the launch: copies among them would be freed.
    given = [_aligned(x) for x in (scale_b, bias, gate, zero_point, column_sum)]
    scale_b, bias, gate, zero_point, column_sum = given
    residual = None if residual is None else _matrix(residual)
    term = _term(low_rank, a, scale_a, scale_b)
    scales = (scale_a, scale_b)
    defined = _defined(a, scales, bias, gate, residual, term, zero_point, activation, out_dtype)
    _launch(out, a, b, scale_a, given, residual, term, defined)
    return out


def _launch(out, a, b, scale_a, given, residual, term: _Term | None, defined: dict) -> None:
    """Write the product to `out`; given: scale_b, bias, gate, zero_point and column_sum."""
    scale_b, bias, gate, zero_point, column_sum = given
    (m, k), n, device = a.shape, len(b), a.device
    rows, columns = -(-m // TILE_M), -(-n // TILE_N)
    down, processors = term.down if term else None, _processors(device)
    tiles = _order(rows, columns, processors if down else 0, device)
    # Flags, and the number of tiles that were taken.
    ready = torch.zeros(rows + 1, dtype=torch.int32, device=device) if down else None
    tensors = (
        *(tiles, scale_a, scale_b, bias, gate, zero_point, column_sum, out),
        *(term.h if term else None, ready, ready[rows:] if down else None),
        *((down.scale, down.shift) if down else (None, None)),
    )
    params = Params(
        *(None if x is None else x.data_ptr() for x in tensors),
        0 if gate is None else gate.stride(0),
        *(m, n, -(-k // STEP), term.u.shape[1] if term else 0, len(tiles)),
        0 if gate is None else m // len(gate),
    )
    maps = (
        *(_map(a, TILE_M), _permuted(b)),
        *(term.maps if term else (no_map(),) * 3),
        no_map() if residual is None else _map(residual, TILE_M),
    )
    one_row = (scale_b if scale_b.numel() > 1 else None, bias, None if defined["GATES"] else gate)
    vectors = [x.dtype for x in one_row if x is not None]
    stages = stages_of(down is not None, vectors)
    shared = shared_bytes(stages, down is not None, vectors)
    with torch.cuda.device(device):
        kernel = _kernel(device.index, shared, ("STAGES", stages), *defined.items())
        stream = torch.cuda.current_stream(device).cuda_stream
        blocks = min(len(tiles), processors)
        kernel.launch((blocks, 1, 1), THREADS, (params, *maps), stream, dependent=True)


def _missing(device: torch.device) -> str | None:
    """Return why the kernel cannot run on `device`, or None."""
    if device.type == "cuda" and capability(device) != HOPPER:
        return f"needs compute capability {HOPPER}, got {capability(device)}"
    return nvrtc.missing()


NEEDS = Needs(
    frozenset(f"{x}_{scales}" for x in ("int8", "fp8") for scales in ("tensor", "row")),
    devices=frozenset({"cuda"}),
    capability=HOPPER,
    few=False,
    n_multiple=COLUMNS,
    self_test=_missing,
)
register(Backend(OP, "hopper", 5, NEEDS, run, projects=True))
