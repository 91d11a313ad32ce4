"""The Triton backend of `attention`: how its kernel is cut and launched."""

from dataclasses import dataclass

import torch

from ..launch import ALIGNMENT, TRITON_MIN, alignment, launch
from ..registry import Backend, Needs, capability, register
from . import KINDS, OP, scheme
from .modes import MODES, Mode
from .prepare import TILE, count, prepare, width
from .prologue import NOTHING

# The largest head size whose tiles fit.
D_MAX = 256
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2


@dataclass(frozen=True)
class Cut:
    """One way to cut an attention. m: rows of a program; n: keys of a step; warps, stages."""

    m: int
    n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Row:
    """The cut for head sizes of at most this width; of one mode, or of all; with or without mask.

    A mask takes shared memory: 4 bytes for each of m · n logits in each stage.
    """

    cut: Cut
    width_max: int
    mode: str | None = None
    masked: bool = True


# Compiled and tested, not measured: 8.6, 8.9 and 12.0 have 99 KiB of shared memory.
MMA_SYNC = (
    Row(Cut(64, 128, 8, 2), 128, "int8", masked=False),
    Row(Cut(128, 64, 8, 2), 128, "exact", masked=False),
    Row(Cut(128, 64, 8, 2), 128, "fp8", masked=False),
    Row(Cut(64, 128, 8, 1), 256, "int8"),
    Row(Cut(64, 64, 8, 1), 256),
)
HOPPER = (
    Row(Cut(64, 128, 4, 3), 128, "int8", masked=False),
    Row(Cut(64, 128, 4, 3), 128, "fp8", masked=False),
    Row(Cut(128, 64, 8, 3), 128, "exact", masked=False),
    Row(Cut(64, 128, 4, 2), 128, "int8"),
    Row(Cut(64, 128, 8, 2), 256, "int8"),
    Row(Cut(64, 64, 4, 2), 256),
)
# Least compute capability -> rows; the first that fits is taken.
TABLE = {(8, 0): MMA_SYNC, (9, 0): HOPPER, (10, 0): MMA_SYNC}


def choose(has: tuple[int, int], w: int, mode: Mode, masked: bool) -> Cut:
    """Return the cut for a padded head size of w on a GPU of compute capability `has`."""
    rows = TABLE[max(known for known in TABLE if known <= has)]
    fits = (
        r.cut
        for r in rows
        if w <= r.width_max and r.mode in (mode.name, None) and (r.masked or not masked)
    )
    return next(fits)


def run(out, lse, q, k, v, mode, mask, causal, scale, prologue=NOTHING, rotate=False) -> None:
    """Write to out and lse what `attention` describes."""
    cut = choose(capability(q.device), width(q.shape[3]), mode, mask is not None)
    run_cut(out, lse, q, k, v, mode, mask, causal, scale, cut, prologue, rotate)


def run_cut(
    out, lse, q, k, v, mode, mask, causal, scale, cut: Cut, prologue=NOTHING, rotate=False
) -> None:
    """Write to out [B, H, Lq, D] and lse [B, H, Lq], contiguous or None, cut as told."""
    from .kernels.attend import attend_kernel

    ready = prepare(q, k, v, scale, mode, 1, False, lse is not None, prologue, rotate)
    (b, h, length, d), (heads, keys) = q.shape, k.shape[1:3]
    tiles = count(length)
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    operand = v if ready.v is None else ready.v
    constants = (cut.m, cut.n, width(d), mode.code, kind, causal, lse is not None)
    sizes = (
        *(h, h // heads, length, keys, d),
        *(*v.stride(), *mask_strides, *out.stride()),
        *(tiles, count(keys)),
    )
    pointers = (
        *(ready.q, ready.k, operand, ready.q_scale, ready.k_scale),
        *(ready.v_scale, ready.v_offset, ready.v_sum, mask, out, lse),
    )
    if mask is None:
        # Never read; a pointer all the same, which the kernel moves.
        pointers = (*pointers[:8], ready.q_scale, *pointers[9:])
    specialised = tuple((s == 1, s % ALIGNMENT == 0, s >= 2**31) for s in sizes)
    types = (operand.dtype, out.dtype, None if mask is None else mask.dtype)
    launch(
        attend_kernel,
        b * h * tiles * (TILE // cut.m),
        (*pointers, *sizes, *constants),
        {"num_warps": cut.warps, "num_stages": cut.stages},
        (*constants, alignment(*pointers), types, specialised),
        q.device,
    )
    if lse is not None:
        lse += ready.shift.view_as(lse)


def _register(mode: Mode) -> None:
    needs = Needs(
        frozenset(scheme(mode.name, kind) for kind in KINDS),
        devices=frozenset({"cuda"}),
        capability=mode.capability,
        k_max=D_MAX,
        package="triton",
        package_min=TRITON_MIN,
    )
    register(Backend(OP, "triton", 10, needs, run))


for _mode in MODES.values():
    _register(_mode)
