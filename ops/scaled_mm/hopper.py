"""The Hopper backend of `scaled_mm`: CUDA C++, compiled by torch's NVRTC when first called."""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ..cuda import nvrtc
from ..cuda.hopper import HOPPER, OPTIONS, missing
from ..cuda.hopper import source as cuda_source
from ..cuda.kernel import CudaKernel, address
from ..cuda.tensor_map import TensorMap, encoded, tensor_map, unused_map
from ..registry import Backend, Needs, register
from ..replay import empty, launch
from . import OP
from .check import MADE_RANKS, MAX_RANKS, Down

OPERANDS = ("int8", "fp8", "fp8_mixed", "fp8_e5m2")
FOLDER = Path(__file__).with_name("kernels")
SOURCES = ("machine.cu", "order.cu", "epilogue.cu", "product.cu")
THREADS = 384
# Rows and columns of a tile, bytes of K of a stage.
TILE_M, TILE_N, STEP = 128, 256, 128
STAGES = 4
SHARED_BYTES = 227 * 1024
# A thread stores eight neighbouring columns of a result, four threads as many as there are here.
COLUMNS = 32
# Row tiles that share columns in the L2.
GROUP = 16
# Row tiles that a number of 16 bits names.
MOST_ROWS = (1 << 16) - 1
ALIGNMENT = 16
# As the source has them.
TYPES = {None: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# The two slots in which the next tiles are told; barriers of these and of the vectors.
TILES_BYTES = 2 * 4
BARRIERS = 2 * (2 + 1)
POINTERS = (
    *("scale_a", "scale_b", "bias", "gate", "out", "h", "ready", "taken"),
    *("scale_down", "shift"),
)
# Of these, what there is without a low-rank term, and the rest.
GIVEN = 5
NO_TERM = [None] * (len(POINTERS) - GIVEN)


class Params(ctypes.Structure):
    """The kernel's first parameter, `struct Params` in machine.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("stride_gate", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("m", "n", "steps", "ranks", "tiles", "gate_rows")),
        ("ahead", ctypes.c_int),
    )


def source() -> str:
    """Return the CUDA C++ source, of all its files."""
    return cuda_source(*(FOLDER / name for name in SOURCES))


def options(**defined: int) -> tuple[str, ...]:
    """Return NVRTC's options; defined: what machine.cu lists."""
    return (*OPTIONS, *(f"-D{name}={int(value)}" for name, value in defined.items()))


def shared_bytes(stages: int, projects: bool, vectors: Iterable[torch.dtype]) -> int:
    """Return the shared memory of a block. vectors: the dtypes of those that stay for a tile."""
    stage = (TILE_M + TILE_N + (MADE_RANKS if projects else 0)) * STEP
    held = sum(TILE_N * dtype.itemsize for dtype in vectors)
    return stages * stage + held + TILES_BYTES + 8 * (2 * stages + BARRIERS)


def row_tiles(m: int) -> int:
    """Return the tiles of m rows. Raises ValueError for more than a number of 16 bits names."""
    if m > MOST_ROWS * TILE_M:
        raise ValueError(f"scaled_mm: hopper takes {MOST_ROWS * TILE_M} rows; split a")
    return -(-m // TILE_M)


def order(rows: int, columns: int, ahead: int = 0) -> list[int]:
    """Return the tiles, row | column << 16, in the order in which they are begun.

    In groups of rows that share columns in the L2. ahead: 0, or where other tiles wait for those of
    column 0: so many of these come first, a multiple of GROUP, the others a group before their
    rows. The kernel finds each by itself: `tile_at` in order.cu.
    """
    groups = [range(i, min(i + GROUP, rows)) for i in range(0, rows, GROUP)]
    if not ahead:
        return [row | column << 16 for g in groups for column in range(columns) for row in g]
    tiles = list(range(min(ahead, rows)))
    for i, group in enumerate(groups):
        later = groups[i + 1] if i + 1 < len(groups) else ()
        tiles += [row for row in later if row >= ahead]
        tiles += [row | column << 16 for column in range(1, columns) for row in group]
    return tiles


class Variant(NamedTuple):
    """What the kernel is compiled for; dtypes are None where there is no such tensor."""

    a: torch.dtype
    b: torch.dtype
    out: torch.dtype
    rows_a: bool = True
    rows_b: bool = True
    bias: torch.dtype | None = None
    gate: torch.dtype | None = None
    gates: bool = False
    residual: torch.dtype | None = None
    term: torch.dtype | None = None
    down: bool = False
    gelu: bool = False

    @property
    def vectors(self) -> list[torch.dtype]:
        """The dtypes of what is there for a tile's columns."""
        found = (torch.float32 if self.rows_b else None, self.bias)
        return [x for x in (*found, None if self.gates else self.gate) if x is not None]

    @property
    def stages(self) -> int:
        """How many there is room for."""
        fits = shared_bytes(STAGES, self.down, self.vectors) <= SHARED_BYTES
        return STAGES if fits else STAGES - 1

    def defined(self) -> dict[str, int]:
        """Return what machine.cu wants to be defined."""
        dtypes = (("BIAS", self.bias), ("GATE", self.gate), ("RESIDUAL", self.residual))
        return {
            "INTEGER": self.a == torch.int8,
            "A_E5M2": self.a == torch.float8_e5m2,
            "B_E5M2": self.b == torch.float8_e5m2,
            "STAGES": self.stages,
            "LOW_RANK": self.term is not None,
            "FP16": self.term == torch.float16,
            "DOWN": self.down,
            "GROUP": GROUP,
            "ROWS_A": self.rows_a,
            "ROWS_B": self.rows_b,
            "OUT": TYPES[self.out],
            **{name: TYPES[dtype] for name, dtype in dtypes},
            "GATES": self.gates,
            "GELU": self.gelu,
        }


class _Loaded(nvrtc.Kernel):
    """The kernel of one variant, on the current device."""

    def start(self, programs: int, arguments: Sequence) -> None:
        """Run so many blocks on the current stream, without a low-rank term.

        arguments: the first tensors of `Params`; a, b and the residual; the numbers of `Params`.
        """
        tensors, (a, b, residual) = arguments[:GIVEN], arguments[GIVEN : GIVEN + 3]
        params = Params(*map(address, tensors), *NO_TERM, *arguments[GIVEN + 3 :])
        no_term = (unused_map(),) * 3
        maps = (*_factors(a, b), *no_term, unused_map() if residual is None else _rows(residual))
        self.run(programs, params, maps, a.device.index)

    def run(self, blocks: int, params: Params, maps: Sequence[TensorMap], device: int) -> None:
        """Run so many blocks on the current stream of `device`, the current one."""
        stream = torch._C._cuda_getCurrentRawStream(device)
        self.launch((blocks, 1, 1), THREADS, (params, *maps), stream, early=True)


@functools.cache
def _kernel(device: int, variant: Variant) -> _Loaded:
    """Return the kernel for `device`, which is the current one."""
    code = nvrtc.machine_code(source(), options(**variant.defined()))
    shared = shared_bytes(variant.stages, variant.down, variant.vectors)
    return _Loaded(code, "scaled_mm", shared)


class _Product(CudaKernel):
    """The kernel as `ops.launch` takes it, which `_Loaded.start` then runs."""

    def __init__(self):
        self.fn = self

    def load(self, device: torch.device, variant: Variant) -> _Loaded:
        """Compile and load a variant for `device`, the current one."""
        return _kernel(device.index, variant)


PRODUCT = _Product()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x [C] or [R, C], or a copy where a row of it starts at no multiple of 16 bytes."""
    size = x.element_size()
    if not x.data_ptr() % ALIGNMENT and (x.dim() == 1 or not x.stride(0) * size % ALIGNMENT):
        return x
    unit, count = ALIGNMENT // size, x.shape[-1]
    copy = x.new_empty((*x.shape[:-1], -(-count // unit) * unit))[..., :count]
    return copy.copy_(x)


def _vector(x: torch.Tensor) -> torch.Tensor:
    """Return x of any shape as it is, or a copy, where its elements do not lie as a vector's."""
    return x if x.is_contiguous() and not x.data_ptr() % ALIGNMENT else _aligned(x.reshape(-1))


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """Return x [R, C] as a map can describe it: the stride of one row may be anything."""
    if x.shape[0] == 1 and x.shape[1] * x.element_size() % ALIGNMENT == 0:
        x = x.as_strided(x.shape, (x.shape[1], 1))
    return _aligned(x)


def _map(x: torch.Tensor, rows: int) -> TensorMap:
    """Return the map by which boxes of so many rows and 128 bytes come."""
    return tensor_map(x, (rows, STEP // x.element_size()))


def permuted(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple, tuple]:
    """Return (shape, strides) of a matrix in such an order of rows that sums are neighbours.

    Of 32 rows, 8·i + 2·j + e comes as 8·j + 2·i + e (i, j below 4, e below 2).
    """
    (rows, columns), (apart, step) = shape, strides
    sizes = (rows // COLUMNS, 4, 4, 2, columns)
    return sizes, (COLUMNS * apart, 2 * apart, 8 * apart, apart, step)


def _rows(x: torch.Tensor) -> TensorMap:
    """Return the map by which a tile's rows of x come."""
    return _map(x, TILE_M)


def _factors(a: torch.Tensor, b: torch.Tensor) -> tuple[TensorMap, TensorMap]:
    return _rows(a), _permuted(b)


def _permuted(x: torch.Tensor) -> TensorMap:
    """Return the map by which 256 rows of x come as `permuted` has them."""
    box = (TILE_N // COLUMNS, 4, 4, 2, STEP // x.element_size())
    return encoded(x.data_ptr(), x.dtype, *permuted(x.shape, x.stride()), box)


@dataclass(frozen=True)
class _Term:
    """A low-rank term as the kernel takes it, with what has to stay alive until the launch.

    h: given, or to be written to; u: both in 16 bits. down, ready: where h is made within; ready
    has a flag for each row tile, and the number of tiles that were taken.
    """

    h: torch.Tensor
    u: torch.Tensor
    down: Down | None = None
    ready: torch.Tensor | None = None

    @property
    def maps(self) -> tuple[TensorMap, TensorMap, TensorMap]:
        down = unused_map() if self.down is None else _map(self.down.stored, MADE_RANKS)
        return *_factors(self.h, self.u), down

    @property
    def pointers(self) -> list[int | None]:
        """Those of `Params` from h on."""
        if self.down is None:
            return NO_TERM
        flags, (_, scale, shift) = self.ready, self.down
        tensors = self.h, flags, flags[-1:], scale, shift
        return list(map(address, tensors))


def _term(low_rank, m: int) -> _Term:
    """Return the term of m rows. Raises ValueError where it has too many ranks."""
    h, u = low_rank
    most = MADE_RANKS if isinstance(h, Down) else MAX_RANKS
    if u.shape[1] > most:
        raise ValueError(
            f"scaled_mm: hopper takes {most} ranks, not {u.shape[1]}; name another backend, or none"
        )
    if isinstance(h, Down):
        tiles, device = row_tiles(m), u.device
        made = torch.empty((tiles * TILE_M, MADE_RANKS), dtype=u.dtype, device=device)
        ready = torch.zeros(tiles + 1, dtype=torch.int32, device=device)
        return _Term(made, _matrix(u), h._replace(stored=_matrix(h.stored)), ready)
    return _Term(_matrix(h), _matrix(u))


def _dtype(x: torch.Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype


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

    Raises ValueError for a zero point, a term of more than MAX_RANKS ranks, or a `Down` of more
    than MADE_RANKS.
    """
    if zero_point is not None:
        raise ValueError("scaled_mm: hopper takes no zero point; name another backend, or none")
    if a.device.index != torch.cuda.current_device():
        with torch.cuda.device(a.device):
            rest = (bias, zero_point, column_sum, activation, gate, residual, out_dtype, low_rank)
            return run(a, b, scale_a, scale_b, *rest)
    (m, k), n = a.shape, b.shape[0]
    out = empty((m, n), out_dtype, a.device)
    term = None if low_rank is None else _term(low_rank, m)
    a, b, scale_b = _matrix(a), _matrix(b), _vector(scale_b)
    bias, gate, residual = (x if x is None else _aligned(x) for x in (bias, gate, residual))
    variant = Variant(
        *(a.dtype, b.dtype, out_dtype, scale_a.numel() > 1, scale_b.numel() > 1),
        *(_dtype(bias), _dtype(gate), gate is not None and gate.shape[0] > 1, _dtype(residual)),
        *(None if term is None else term.u.dtype, term is not None and term.down is not None),
        activation is not None,
    )
    tensors, processors = (scale_a, scale_b, bias, gate, out), _processors(a.device)
    tiles = row_tiles(m) * -(-n // TILE_N)
    numbers = (
        0 if gate is None else gate.stride(0),
        *(m, n, -(-k // STEP), 0 if term is None else term.u.shape[1], tiles),
        0 if gate is None else m // gate.shape[0],
        -(-processors // GROUP) * GROUP,
    )
    blocks = min(tiles, processors)
    if term is None:
        arguments = (*tensors, a, b, residual, *numbers)
        launch(PRODUCT, blocks, arguments, {"variant": variant}, None, a.device)
        return out
    maps = (*_factors(a, b), *term.maps, unused_map() if residual is None else _rows(residual))
    pointers = map(address, tensors)
    params = Params(*pointers, *term.pointers, *numbers)
    _kernel(a.device.index, variant).run(blocks, params, maps, a.device.index)
    return out


NEEDS = Needs(
    frozenset(f"{x}_{scales}" for x in OPERANDS for scales in ("tensor", "row")),
    devices=frozenset({"cuda"}),
    capability=HOPPER,
    measured=(HOPPER, (10, 0)),
    few=False,
    n_multiple=COLUMNS,
    self_test=missing,
)
register(Backend(OP, "hopper", 5, NEEDS, run, projects=True))
