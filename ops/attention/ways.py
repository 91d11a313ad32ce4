"""The ways to compute attention that the router knows, each with what it needs.

Their schemes are dtypes, with `_masked` or `_causal` after them. A way of torch's or of a package
is tried on a small example before it is first used on a device.
"""

import subprocess
import warnings
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import registry, tuning
from ..attention_fp4 import WIDTHS, attention_fp4
from ..current_gpu import on_gpu_of
from ..failures import failures
from ..registry import Backend, Call, Needs, register
from . import attention, sage
from .check import DTYPES
from .modes import MODES
from .prologue import NOTHING

OP = "attention router"
SDPA = "sdpa"
# Before the name of a mode of `attention`.
LOWBIT = "lowbit_"
FP4 = f"{LOWBIT}fp4"
PLAIN, MASKED, CAUSAL, BOTH = "", "_masked", "_causal", "_masked_causal"
ALL = (PLAIN, MASKED, CAUSAL, BOTH)
CUDA, CPU = frozenset({"cuda"}), frozenset({"cpu"})
FLOATS = (*DTYPES, torch.float32, torch.float64)
# Bits of the coarsest product of a way; 8 where nothing is said.
BITS = {SDPA: 16, "cudnn": 16, "flash": 16, FP4: 4, "sageattn3_fp4": 4}
# Relative L2 error above which a way of so many bits is broken, not coarse. Measured on normal,
# clustered and heavy-tailed data and on outlier channels: at most .003 in 16 bits, .08 in 8 and .19
# in 4. A black frame errs by 1, noise by more.
BROKEN = {16: 0.02, 8: 0.25, 4: 0.5}
# The example: queries and keys that no tile divides.
QUERIES, KEYS = 200, 333
# What a package raises where it cannot run, besides what kernels do.
REFUSALS = (
    *(ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError),
    # Kernels that are compiled when first called want a compiler.
    *(ImportError, OSError, subprocess.SubprocessError),
)


def bits(way: str) -> int:
    """Return the bits of the coarsest product of a way: 16, 8 or 4."""
    return BITS.get(way, 8)


def named(dtype: torch.dtype) -> str:
    """Return the name of a dtype as schemes have it."""
    return str(dtype).removeprefix("torch.")


def prepares(way: str) -> bool:
    """Return whether a way does the norm, rotary embedding and rotation of q and k itself."""
    return way.removeprefix(LOWBIT) in MODES and way.startswith(LOWBIT)


@tuning.cached
def unmet(way: str, scheme: str, device: torch.device, head_size: int) -> str | None:
    """Return why none of the sets of needs of a way holds, or None. scheme: as registered here."""
    call = Call(scheme, device, 0, head_size)
    reasons = []
    for backend in registry.backends(OP):
        if backend.name == way:
            reason = registry.unmet(backend.needs, call)
            if reason is None:
                return None
            reasons.append(reason)
    # Of several, one that is not the device says more, and the last set of needs takes the most.
    telling = [reason for reason in reasons if not reason.startswith("needs a device")]
    return f"{way}: {(telling or reasons)[-1]}"


def _schemes(*kinds: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> frozenset[str]:
    return frozenset(f"{named(dtype)}{kind}" for dtype, kind in product(dtypes, kinds))


def sdpa(q, k, v, mask, causal: bool, scale: float | None) -> torch.Tensor:
    """Return torch's own attention; q [B, H, Lq, D], k and v [B, Hkv, Lk, D]."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def _by(backend: SDPBackend) -> Callable:
    """Return torch's attention by one of its backends alone."""

    def run(q, k, v, mask, causal, scale) -> torch.Tensor:
        # These want channels side by side, which torch by itself sees to by another choice.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if mask is not None and mask.dtype not in (torch.bool, q.dtype):
            mask = mask.to(q.dtype)
        with sdpa_kernel(backend):
            return sdpa(q, k, v, mask, causal, scale)

    return run


def _lowbit(mode: str) -> Callable:
    def run(q, k, v, mask, causal, scale, prologue=NOTHING, rotate=False) -> torch.Tensor:
        dtype = q.dtype
        # Float32 gets here on a CPU alone.
        if dtype not in DTYPES:
            q, k, v = (x.bfloat16() for x in (q, k, v))
        options = {"mask": mask, "causal": causal, "scale": scale, "prologue": prologue}
        return attention(q, k, v, mode, **options, rotate=rotate).to(dtype)

    return run


def _fp4(q, k, v, mask, causal, scale) -> torch.Tensor:
    # By name: on a GPU the reference would be an emulation that nobody asked for.
    return attention_fp4(q, k, v, scale, "reference" if q.device.type == "cpu" else "triton")


def _kitchen(q, k, v, mask, causal, scale) -> torch.Tensor:
    import comfy_kitchen

    return comfy_kitchen.int8_attention(q, k, v, scale=scale, attn_mask=mask)


def _kitchen_missing(device: torch.device) -> str | None:
    import comfy_kitchen

    available = getattr(comfy_kitchen, "int8_attention_is_available", None)
    if available is None:
        return "this comfy_kitchen has no INT8 attention"
    with torch.cuda.device(device):
        return None if available() else "comfy_kitchen's INT8 attention does not run on this GPU"


def relative_error(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return |got - want| / |want| as a tensor; 0 where both are zero, NaN where one is."""
    least = torch.finfo(torch.float32).tiny
    return (got.float() - want.float()).norm() / want.float().norm().clamp_min(least)


def trial(run: Callable, head_size: int, most: float) -> Callable:
    """Return a test of a way's `run`, for `Needs.self_test`: a reason on a device, or None.

    most: the relative error allowed.
    """

    def test(device: torch.device) -> str | None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, 2, length, head_size) for length in (QUERIES, KEYS, KEYS)]
        q, k, v = (torch.randn(s, generator=generator).to(device, torch.bfloat16) for s in shapes)
        want = sdpa(q.float(), k.float(), v.float(), None, False, None)
        try:
            with warnings.catch_warnings():
                # torch warns of every backend that it does not take, and raises besides.
                warnings.simplefilter("ignore", UserWarning)
                with on_gpu_of(q):
                    got = run(q, k, v, None, False, None)
        except (*failures(), *REFUSALS) as error:
            return f"fails here: {type(error).__name__}: {error}"
        error = relative_error(got, want).item()
        # Not `>`, which NaN would pass.
        return None if error <= most else f"errs by {error:.2f} here, at most {most} is allowed"

    return test


def _register(name: str, run: Callable, schemes: frozenset[str], **needs) -> None:
    rank = len(registry.backends(OP))
    register(Backend(OP, name, rank, Needs(schemes, **needs), run))


def _register_tried(name: str, run: Callable, kinds: tuple[str, ...], k_max: int, **needs) -> None:
    """Register a way for GPUs that is tried with its largest head."""
    test = trial(run, k_max, BROKEN[bits(name)])
    schemes = _schemes(*kinds)
    _register(name, run, schemes, devices=CUDA, k_max=k_max, self_test=test, **needs)


_register(SDPA, sdpa, _schemes(*ALL, dtypes=FLOATS))
_cudnn, _flash = _by(SDPBackend.CUDNN_ATTENTION), _by(SDPBackend.FLASH_ATTENTION)
# Heads above 128 are another kernel of cuDNN's, which torch takes on Hopper alone.
for _k_max, _least in ((128, (8, 0)), (256, (9, 0))):
    _needs = {"capability": _least, "k_multiple": 8}
    _register_tried("cudnn", _cudnn, (PLAIN, MASKED, CAUSAL), _k_max, **_needs)
_register_tried("flash", _flash, (PLAIN, CAUSAL), 256, capability=(8, 0))
for _mode in MODES.values():
    _name = f"{LOWBIT}{_mode.name}"
    _register(
        *(_name, _lowbit(_mode.name), _schemes(*ALL)),
        **{"devices": CUDA, "capability": _mode.capability, "k_max": 256, "package": "triton"},
    )
    _on_cpu = _schemes(*ALL, dtypes=(*DTYPES, torch.float32))
    _register(_name, _lowbit(_mode.name), _on_cpu, devices=CPU)
# EXPERIMENTAL: no GPU that has the instructions has run it, so it is tried like a package.
_fp4_needs = {"k_max": max(WIDTHS), "k_multiple": min(WIDTHS)}
_fp4_gpu = {"capability": (10, 0), "package": "triton", "package_min": (3, 6)}
_fp4_gpu["self_test"] = {width: trial(_fp4, width, BROKEN[bits(FP4)]) for width in WIDTHS}
_register(FP4, _fp4, _schemes(PLAIN), devices=CUDA, **_fp4_needs, **_fp4_gpu)
_fp4_on_cpu = _schemes(PLAIN, dtypes=(*DTYPES, torch.float32))
_register(FP4, _fp4, _fp4_on_cpu, devices=CPU, **_fp4_needs)
_register(
    *("kitchen_int8", _kitchen, _schemes(PLAIN, MASKED)),
    **{"devices": CUDA, "k_max": 256, "package": "comfy_kitchen", "self_test": _kitchen_missing},
)
_sage_needs = {"k_max": sage.K_MAX, "capability": (8, 0), "package": "sageattention"}
_register_tried("sageattn", sage.sageattn, (PLAIN, CAUSAL), **_sage_needs)
_sage3_needs = {"k_max": sage.K_MAX, "capability": (10, 0), "package": "sageattn3"}
_register_tried("sageattn3_fp4", sage.sageattn3, (PLAIN,), **_sage3_needs)
