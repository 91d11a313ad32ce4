"""The Hopper backend of `attention`: CUDA C++, compiled by torch's NVRTC when first called."""

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cuda import FOLDER as CUDA
from ..cuda import nvrtc
from ..cuda.hopper import HOPPER, OPTIONS, missing
from ..cuda.hopper import source as cuda_source
from ..cuda.kernel import CudaKernel, address
from ..cuda.tensor_map import TensorMap, tensor_map, unused_map
from ..launch import TRITON_MIN
from ..registry import Backend, Needs, register
from ..replay import empty, launch, replayed
from . import CAUSAL, KEYS, OP, scheme
from .modes import MODES, Mode
from .prepare import TILE, prepare
from .prepass import DTYPES
from .prologue import NOTHING, of_arguments

D = 128
THREADS = 384
# Scales of 128 keys: each thread of four holds the keys of one.
GROUPS = 4
SOURCES = ("machine.cu", "softmax.cu", "attend.cu")
FOLDER = Path(__file__).with_name("kernels")
# The fastest of what was measured on an H200, by mode; `machine.cu` says what the names mean.
USUAL = {
    "STAGES": 4,
    "PINGPONG": 0,
    "DOUBLE": 1,
    "PACED": 1,
    "Q_IN_REGISTERS": 0,
    "TILES_SUMMED": 1,
}
VARIANTS = {
    "exact": USUAL | {"STAGES": 3, "PACED": 0, "Q_IN_REGISTERS": 1},
    "fp8": USUAL | {"TILES_SUMMED": 2},
    "int8": USUAL,
}
# With a mask of keys: others would spill.
MASKED_VARIANTS = {"fp8": {"PINGPONG": 1, "PACED": 0}}
# From so many keys on, where power limits: two blocks share their copies of K and V, which lets the
# clock rise by 5%. Measured at 75,600 and 32,760 keys. Not with a mask, and not with causal
# attention, where the two would see other keys.
LONG_KEYS = 32000
LONG_VARIANTS = {"exact": {"CLUSTER": 2, "DOUBLE": 0, "STAGES": 4}}
# Beside the channels of a tile of FP8 V: one whose P·V is P's sum, and seven that fill eight up.
ONES_ROWS = 8
# Elements of a row of 128 bytes.
BOX_COLUMNS = 64
# Of a tile of rows whose keys several blocks of threads share: blocks at most, tiles of keys that
# each has at least.
MOST_PARTS, MIN_TILES = 16, 4
# What it costs, in tiles of 2,000 cycles: a block beside its tiles; that any keys are shared, which
# takes one more launch; and to add up what each block has.
BLOCK_TILES, SHARED_TILES, PART_TILES = 4, 5, 1
# All such blocks at most, in multiples of what the GPU runs at once: each leaves 70 KB to the last
# block of its rows, 64 sums and 4 numbers of two rows for each of 256 threads.
MOST_ROUNDS, PARTIAL = 2, 256 * (64 + 4)
# Elements after the biases of a tile of keys: whether any is not zero.
BIAS_MORE = 4
# Of masks, as bias.cu numbers them.
MASKS = {**DTYPES, torch.bool: 3}
# The first fields of `Params`, which are tensors.
POINTERS = 11


class Divisor(ctypes.Structure):
    """`struct Divisor` in machine.cu."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("divisor", "multiplier", "shift"))


def divisor(d: int) -> tuple[int, int, int]:
    """Return `Divisor` of d, at least 1, by which products divide below 2^31 (Granlund, 1994)."""
    bits = (d - 1).bit_length()
    return (d, 0, 0) if d == 1 else (d, -(-(1 << 31 + bits) // d), bits - 1)


class Params(ctypes.Structure):
    """The kernel's first parameter, `struct Params` in machine.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "q_scale", "k_scale", "v_scale")),
        *((name, ctypes.c_void_p) for name in ("v_offset", "q_bound", "k_bound", "out", "lse")),
        *((name, ctypes.c_longlong) for name in ("out_b", "out_h", "out_l")),
        *((name, ctypes.c_int) for name in ("rows", "keys", "tiles", "blocks")),
        ("whole", ctypes.c_uint32),
        *((name, Divisor) for name in ("parts", "units", "heads", "group")),
        *((name, ctypes.c_void_p) for name in ("partial", "done")),
        *(("bias", ctypes.c_void_p), ("bias_b", ctypes.c_longlong), ("bias_h", ctypes.c_longlong)),
    )


# `Params` packed in one step: with its fields given one by one it took the host 7 µs.
PACKED = struct.Struct("11P3q4i13I3P2q")


def _map_of(v: torch.Tensor) -> TensorMap:
    """Return the map by which boxes of 128 keys and 64 channels of v [B, Hkv, Lk, 128] come."""
    return tensor_map(v, (1, 1, TILE, BOX_COLUMNS))


def _readable(v: torch.Tensor) -> torch.Tensor:
    """Return v, or a copy where its strides or start are none that a map can have."""
    unit = 16 // v.element_size()
    aligned = v.data_ptr() % 16 == 0 and v.stride(3) == 1
    if aligned and all(s > 0 and s % unit == 0 for s in v.stride()[:3]):
        return v
    return v.clone(memory_format=torch.contiguous_format)


def source() -> str:
    """Return the CUDA C++ source, of all its files."""
    return cuda_source(*(FOLDER / name for name in SOURCES))


def bias_source() -> str:
    """Return the CUDA C++ source of the kernel that reads masks."""
    paths = CUDA / "ampere.cu", FOLDER / "bias.cu"
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def bias_defined(dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """Return the names that bias.cu wants set, with their values, for masks of a dtype."""
    return ("MASK", MASKS[dtype]), ("TILE", TILE), ("MORE", BIAS_MORE)


# With what fills up the last 8 bytes.
BIAS = CudaKernel("bias_of_mask", 2, "3q3i4x", bias_source)


@dataclass(frozen=True)
class Kind:
    """What one compiled kernel is for. biased: there is a mask of keys. long: LONG_KEYS or more."""

    mode: Mode
    dtype: torch.dtype
    causal: bool = False
    biased: bool = False
    long: bool = False

    @property
    def variant(self) -> dict[str, int]:
        """Return what VARIANTS and those that differ from them say of the kind."""
        name = self.mode.name
        masked = MASKED_VARIANTS.get(name, {}) if self.biased else {}
        shared = self.long and not self.causal and not self.biased
        alone = {**VARIANTS[name], "CLUSTER": 1, **masked}
        return alone | (LONG_VARIANTS.get(name, {}) if shared else {})

    @property
    def options(self) -> tuple[str, ...]:
        """Return NVRTC's options."""
        defined = {
            **{"PV": self.mode.code, "FP16": int(self.dtype == torch.float16), **self.variant},
            **{"CAUSAL": int(self.causal), "BIASED": int(self.biased), "PARTIAL": PARTIAL},
        }
        return (*OPTIONS, *(f"-D{name}={value}" for name, value in defined.items()))

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block: Q, stages of K and V, ones; it begins at 1 KiB."""
        v_bytes = TILE * D * (2 if self.mode.storage is None else 1)
        ones_bytes = TILE * ONES_ROWS if self.mode.storage == torch.float8_e4m3fn else 0
        return 1024 + TILE * D + self.variant["STAGES"] * (TILE * D + v_bytes + ones_bytes)


def _once(mask: torch.Tensor) -> torch.Tensor:
    """Return an expanded mask with one element where all are the same: of queries, they are."""
    for i in (0, 1, 2):
        if i == 2 or mask.stride(i) == 0:
            mask = mask.narrow(i, 0, 1)
    return mask


def bias_of(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask of keys [B, H, 1, Lk] as [B, H, blocks, 132] float32: what the logits gain.

    mask: of a dtype in MASKS. In log2 units, -inf for hidden keys and for those that fill the last
    block of 128; after them four times 0 where all of the 128 are zero, NaN where any is NaN, else
    1.
    """
    b, h, _, keys = mask.shape
    blocks = -(-keys // TILE)
    bias = empty((b, h, blocks, TILE + BIAS_MORE), torch.float32, mask.device)
    strides = (mask.stride(i) for i in (0, 1, 3))
    arguments = (mask, bias, *strides, h, keys, blocks)
    options = {"threads": TILE, "shared_bytes": 0, "defined": bias_defined(mask.dtype)}
    launch(BIAS, b * h * blocks, arguments, options, None, mask.device)
    return bias


def _strides(bias: torch.Tensor | None) -> tuple[int, int]:
    """Return the strides of batch and heads, zero where one is for all."""
    if bias is None:
        return 0, 0
    return tuple(0 if bias.shape[i] == 1 else bias.stride(i) for i in (0, 1))


@functools.cache
def split(units: int, blocks: int, at_once: int) -> tuple[int, int]:
    """Return how many units go whole, and into how many parts the keys of each other one.

    units: clusters of blocks of threads, of which `at_once` run at a time. blocks: tiles of keys.
    Those that would run last, with others idle, are split where this ends sooner.
    """
    left = units % at_once

    def cost(parts: int) -> int:
        more = SHARED_TILES + PART_TILES * parts if parts > 1 else 0
        return -(-left * parts // at_once) * (-(-blocks // parts) + BLOCK_TILES) + more

    most = min(MOST_PARTS, blocks // MIN_TILES, MOST_ROUNDS * at_once // max(left, 1))
    parts = min(range(1, max(most, 1) + 1), key=cost)
    return (units, 1) if parts == 1 else (units - left, parts)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Loaded(nvrtc.Kernel):
    """The kernel of one kind, on the current device."""

    # As in `cuda.kernel.Loaded`.
    by_address = True

    def start(self, programs: int, arguments: Sequence) -> None:
        """Run so many blocks on the current stream of a device, which is the current one.

        arguments: as `_attend` lists them, V as a tensor.
        """
        room, bias, v, device, counters, partial_bytes, strides, *numbers = arguments[POINTERS:]
        stream = torch._C._cuda_getCurrentRawStream(device)
        # What each block leaves, and how many have.
        partial = address(room)
        done = partial + partial_bytes
        if counters:
            nvrtc.clear(done, counters, stream)
        pointers = map(address, arguments[:POINTERS])
        packed = PACKED.pack(*pointers, *numbers, partial, done, address(bias), *strides)
        params = Params.from_buffer_copy(packed)
        map_of_v = unused_map() if v is None else _map_of(v)
        self.launch((programs, 1, 1), THREADS, (params, map_of_v), stream)


class _Attention(CudaKernel):
    """The kernel as `ops.launch` takes it, which `_Loaded.start` then runs."""

    def __init__(self):
        self.fn = self

    def load(self, device: torch.device, kind: Kind, variant: tuple) -> _Loaded:
        """Compile and load a kind, whose variant is given, for `device`, the current one."""
        code = nvrtc.machine_code(source(), kind.options)
        return _Loaded(code, "attention", kind.shared_bytes)


ATTENTION = _Attention()


@replayed
def _attend(
    out, lse, q, k, v, mask, mode: str, causal: bool, scale: float, rotate: bool, *steps
) -> tuple[torch.Tensor | None]:
    """Write to out and lse; return what lse lacks, [B · H, Lq], if there is one.

    v: where the mode reads it as it came, by a map. mask: for `bias_of`. steps: of a prologue.
    """
    mode, prologue = MODES[mode], of_arguments(*steps)
    ready = prepare(q, k, v, scale, mode, GROUPS, True, lse is not None, prologue, rotate)
    (b, h, length, _), (heads, keys) = q.shape, k.shape[1:3]
    tiles, blocks = ready.q.shape[1], ready.k.shape[1]
    bias = None if mask is None else bias_of(mask)
    kind = Kind(mode, q.dtype, causal, bias is not None, keys >= LONG_KEYS)
    cluster = kind.variant["CLUSTER"]
    of_head = -(-tiles // cluster)
    units, at_once = of_head * h * b, _processors(q.device.index) // cluster
    # Causal rows see few keys or many: in each head the longest go first instead.
    whole, parts = (units, 1) if causal else split(units, blocks, at_once)
    # A counter for each tile of rows whose keys are shared.
    counters = (units - whole) * cluster
    partial, room = counters * parts * PARTIAL, None
    if counters:
        room = empty((partial + counters,), torch.float32, q.device)
    tensors = (
        *(ready.q, ready.k, ready.v, ready.q_scale, ready.k_scale, ready.v_scale),
        *(ready.v_offset, ready.q_bound, ready.k_bound, out, lse),
    )
    numbers = (
        *(*out.stride()[:3], length, keys, tiles, blocks, whole),
        *(number for d in (parts, of_head, h, h // heads) for number in divisor(d)),
    )
    given = (
        *(*tensors, room, bias, v if ready.v is None else None),
        *(q.device.index, counters, partial * torch.float32.itemsize, _strides(bias), *numbers),
    )
    options = {"kind": kind, "variant": tuple(kind.variant.items())}
    launch(ATTENTION, whole * cluster + counters * parts, given, options, None, q.device)
    return (ready.shift,)


def run(out, lse, q, k, v, mode, mask, causal, scale, prologue=NOTHING, rotate=False) -> None:
    """Write to out and lse what `attention` describes; a mask is of keys, and not with causal."""
    if mask is not None:
        # Then it is small, whatever it was expanded to.
        mask = _once(mask)
        mask = mask if mask.dtype in MASKS else mask.float()
    if mode.storage is None:
        v = _readable(v)
    steps = prologue.arguments
    (shift,) = _attend(out, lse, q, k, v, mask, mode.name, causal, scale, rotate, *steps)
    if lse is not None:
        lse += shift.view_as(lse)


NEEDS = Needs(
    frozenset(scheme(mode, kind) for mode in MODES for kind in (None, KEYS, CAUSAL)),
    devices=frozenset({"cuda"}),
    capability=HOPPER,
    k_multiple=D,
    k_max=D,
    package="triton",
    package_min=TRITON_MIN,
    self_test=missing,
)
register(Backend(OP, "hopper", 5, NEEDS, run))
