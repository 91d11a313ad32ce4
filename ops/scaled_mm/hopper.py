"""The Hopper backend of `scaled_mm`: CUDA C++, compiled by torch's NVRTC when first called."""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F

from ..cuda import HOPPER_OPTIONS, nvrtc
from ..cuda import source as cuda_source
from ..cuda.tensor_map import TensorMap, no_map, tensor_map
from ..registry import Backend, Needs, capability, register
from . import OP
from .check import Down, in_8_bits
from .reference import in_16_bits

HOPPER = (9, 0)
AHEAD = None
PDL = True
FOLDER = Path(__file__).with_name("kernels")
SOURCES = ("machine.cu", "product.cu")
THREADS = 384
# Rows and columns of a tile, bytes of K of a stage.
TILE_M, TILE_N, STEP = 128, 256, 128
STAGES = 4
# Columns of a result are stored eight neighbours a thread, of four threads.
COLUMNS = 32
# Row tiles that share columns in the L2.
GROUP = 16
# Ranks of a stage, which are all that can be projected here, and of all stages.
RANKS = 64
MAX_RANKS = RANKS * STAGES
ALIGNMENT = 16
# As the source has them.
TYPES = {None: 0, torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
BARRIER_BYTES = 8 * (2 * STAGES + 6)
POINTERS = (
    *("order", "scale_a", "scale_b", "bias", "gate", "residual", "out", "h", "ready", "taken"),
    *("scale_down", "shift"),
)


class Params(ctypes.Structure):
    """The kernel's first parameter, `struct Params` in machine.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_longlong) for name in ("stride_gate", "stride_residual")),
        *((name, ctypes.c_int) for name in ("m", "n", "steps", "ranks", "tiles", "gate_rows")),
    )


def source() -> str:
    """Return the CUDA C++ source, of all its files."""
    return cuda_source(*(FOLDER / name for name in SOURCES))


def options(**defined: int) -> tuple[str, ...]:
    """Return NVRTC's options; defined: what machine.cu lists, but STAGES."""
    names = {"STAGES": STAGES, **defined}
    return (*HOPPER_OPTIONS, *(f"-D{name}={int(value)}" for name, value in names.items()))


def shared_bytes(projects: bool) -> int:
    """Return the shared memory of a block: the stages, scales and biases of a tile, barriers."""
    stage = (TILE_M + TILE_N + (RANKS if projects else 0)) * STEP
    return STAGES * stage + TILE_N * 8 + 8 + BARRIER_BYTES


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
def _kernel(device: int, projects: bool, *defined: tuple[str, int]) -> nvrtc.Kernel:
    code = nvrtc.compile_source(source(), options(DOWN=projects, **dict(defined)))
    return nvrtc.Kernel(code, "product", shared_bytes(projects))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x, or a copy where a row of it starts at no multiple of 16 bytes."""
    if x is None:
        return None
    rows = x.dim() == 2 and len(x) > 1 and x.stride(0) * x.element_size() % ALIGNMENT
    if x.data_ptr() % ALIGNMENT or rows:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """Return x [R, C] as a map can describe it: the stride of one row may be anything."""
    return _aligned(x if len(x) > 1 else x.as_strided(x.shape, (x.shape[1], 1)))


def _map(x: torch.Tensor, rows: int) -> TensorMap:
    """Return the map by which boxes of so many rows and 128 bytes come."""
    return tensor_map(x, (rows, STEP // x.element_size()))


def _permuted(x: torch.Tensor) -> TensorMap:
    """Return the map by which 256 rows of x come, ordered as the sums of a thread are neighbours.

    Of 32 rows, 8·i + 2·j + e arrives as 8·j + 2·i + e (i, j below 4, e below 2).
    """
    parts = x.unflatten(0, (-1, 4, 4, 2)).transpose(1, 2)
    return tensor_map(parts, (TILE_N // COLUMNS, 4, 4, 2, STEP // x.element_size()))


def _term(low_rank, scale_a, scale_b):
    """Return (h or Down or None, u or None), 16 bits, as maps can describe them."""
    if low_rank is None:
        return None, None
    h, u = low_rank
    if not isinstance(h, Down):
        h, u = in_16_bits(low_rank, scale_a, scale_b) if in_8_bits(low_rank) else low_rank
        if pad := -h.shape[1] % 8:
            h, u = F.pad(h, (0, pad)), F.pad(u, (0, pad))
        return _matrix(h), _matrix(u)
    return h, _matrix(u)


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
    """Return the product as `scaled_mm` describes it, without a zero point."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    a, b, scale_b, bias, gate, residual = (
        _matrix(a),
        _matrix(b),
        *(_aligned(x) for x in (scale_b, bias, gate, residual)),
    )
    h, u = _term(low_rank, scale_a, scale_b)
    down = h if isinstance(h, Down) else None
    rows, columns = -(-m // TILE_M), -(-n // TILE_N)
    processors = _processors(a.device)
    tiles = _order(rows, columns, AHEAD if down is not None and AHEAD is not None else processors if down is not None else 0, a.device)
    ready = taken = None
    maps = [_map(a, TILE_M), _permuted(b), no_map(), no_map(), no_map()]
    if u is not None:
        if down is not None:
            h = torch.empty((rows * TILE_M, RANKS), dtype=u.dtype, device=a.device)
            ready = torch.zeros(rows + 1, dtype=torch.int32, device=a.device)
            taken = ready[rows:]
            maps[4] = _map(_matrix(down.stored), RANKS)
        maps[2:4] = _map(h, TILE_M), _permuted(u)
    tensors = (tiles, scale_a, scale_b, bias, gate, residual, out, h, ready, taken)
    tensors += (None, None) if down is None else (down.scale, down.shift)
    gate_rows = 0 if gate is None else m // gate.shape[0]
    params = Params(
        *(None if x is None else x.data_ptr() for x in tensors),
        *(0 if x is None else x.stride(0) for x in (gate, residual)),
        *(m, n, -(-k // STEP), 0 if u is None else u.shape[1], tiles.numel(), gate_rows),
    )
    defined = {
        "INTEGER": a.dtype == torch.int8,
        "LOW_RANK": u is not None,
        "FP16": u is not None and u.dtype == torch.float16,
        "ROWS_A": scale_a.numel() > 1,
        "ROWS_B": scale_b.numel() > 1,
        "OUT": TYPES[out_dtype],
        **{x: TYPES[None if t is None else t.dtype] for x, t in (("BIAS", bias), ("GATE", gate))},
        "RESIDUAL": TYPES[None if residual is None else residual.dtype],
        "GATES": gate is not None and gate.shape[0] > 1,
        "GELU": activation is not None,
    }
    with torch.cuda.device(a.device):
        kernel = _kernel(a.device.index, down is not None, *defined.items())
        blocks = min(tiles.numel(), processors)
        stream = torch.cuda.current_stream(a.device).cuda_stream
        kernel.launch((blocks, 1, 1), THREADS, (params, *maps), stream, PDL)
    return out


def _missing(device: torch.device) -> str | None:
    """Return why the kernel cannot run on `device`, or None."""
    if device.type == "cuda" and capability(device) != HOPPER:
        return f"needs compute capability {HOPPER}, got {capability(device)}"
    return nvrtc.missing()


NEEDS = Needs(
    frozenset(f"{x}_{scales}" for x in ("int8", "fp8") for scales in ("tensor", "row")),
    devices=frozenset({"cuda"}),
    capability=HOPPER,
    n_multiple=COLUMNS,
    self_test=_missing,
)
