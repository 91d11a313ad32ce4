"""The router: one attention by many ways (`ways.py`), by name or as measured (`auto.py`)."""

import operator

import torch

from .. import registry
from ..current_gpu import on_gpu_of
from ..custom_op import custom_op
from ..registry import NoBackendError
from . import auto, empty_out, guard, kind_of, ways
from .check import DTYPES
from .guard import GUARDS, OFF
from .prologue import ARGUMENTS, NOTHING, Prologue, of_arguments
from .ways import CAUSAL, LOWBIT, MASKED, OP, PLAIN, SDPA, prepares

# The names of older wrappers for what is here under another one, or not at all.
ALIASES = {
    "flash_attn_2": "flash",
    "sageattn_3": "sageattn3_fp4",
    "sageattn_3_fp4": "sageattn3_fp4",
    "sageattn_3_fp8": "lowbit_fp8",
    "sageattn_compiled": "sageattn",
}
_OTHER_MATHS = "computes something else than attention, and is not here; choose auto"
NOT_BUILT = {
    "comfy": "ComfyUI's own attention is what runs without this; choose auto, or none",
    "flash_attn_3": "FlashAttention 3 is not here; choose cudnn, or auto",
    "radial_sage_attention": _OTHER_MATHS,
    "sageattn_ultravico": _OTHER_MATHS,
}
# What may be asked for.
NAMES = ("auto", *dict.fromkeys(backend.name for backend in registry.backends(OP)))


def route(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mode: str = "auto",
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    prologue: Prologue = NOTHING,
    rotate: bool = False,
    guard: str = OFF,
) -> torch.Tensor:
    """Return softmax(scale · q·kᵀ + mask) · v, [B, H, Lq, D], in the dtype of q.

    q: [B, H, Lq, D]; k, v: [B, Hkv, Lk, D] with H % Hkv = 0, of one dtype, any strides, never
    written to. mask: bool (True: the key counts) or added to the logits, broadcast to
    [B, H, Lq, Lk]. scale: None is D**-0.5. mode: one of NAMES, or an older name of ALIASES.
    `auto` takes what `auto.py` has for the call, else torch's own attention. On a CPU a `lowbit_*`
    mode runs the exact reference of `attention`, on float32 rounded to bfloat16. prologue: what is
    done to q and k first; for ways that `prepares` says. rotate: as `attention` has it, in the
    `lowbit_*` ways; `auto` takes no other of 8 bits then; those of 16 have no need of it. guard:
    one of GUARDS; `guard.run` says what each does. There are no gradients, but for `sdpa`.
    Raises ValueError for an unknown mode or guard, and for a named mode that cannot rotate;
    NoBackendError with the reason where the named mode cannot run the call.
    """
    if guard not in GUARDS:
        raise ValueError(f"{OP}: unknown guard {guard!r}; known are {', '.join(GUARDS)}")
    if rotate:
        check_rotation(mode)
    way = choose(q, k, v, mode, mask, causal, rotate=rotate)
    reason = refusal(way, q, k, v, mask, causal)
    if reason:
        raise NoBackendError(f"{OP}: {reason}")
    if prologue is not NOTHING:
        if not prepares(way):
            raise NoBackendError(f"{OP}: {way}: takes no prologue; do its steps before")
        prologue.check(q, k)
    if way == SDPA:
        return ways.sdpa(q, k, v, mask, causal, scale)
    rotate = rotate and prepares(way)
    return _ROUTED(q, k, v, mask, way, causal, scale, guard, rotate, *prologue.arguments)


def known(mode: str) -> str:
    """Return the way, or `auto`, that a mode is a name of.

    Raises ValueError for an unknown mode and NoBackendError for one that is not built.
    """
    if mode in NOT_BUILT:
        raise NoBackendError(f"{OP}: {mode}: {NOT_BUILT[mode]}")
    mode = ALIASES.get(mode, mode)
    if mode not in NAMES:
        raise ValueError(f"{OP}: unknown mode {mode!r}; known are {', '.join(NAMES)}")
    return mode


def check_rotation(mode: str) -> None:
    """Raise ValueError unless `mode` rotates q and k when told to: `auto` and `lowbit_*` do."""
    way = known(mode)
    if way != "auto" and not prepares(way):
        raise ValueError(
            f"{OP}: {way} cannot rotate q and k; choose a lowbit_* mode or auto, or no rotation"
        )


def choose(
    q,
    k,
    v,
    mode: str,
    mask=None,
    causal: bool = False,
    bits_min: int = 0,
    rotate: bool = False,
) -> str:
    """Return the name of the way that `mode` means for a call: itself, but for `auto`.

    bits_min: the least bits of what `auto` takes. rotate: it takes nothing of 8 bits that does not
    rotate. Raises what `known` raises.
    """
    mode = known(mode)
    if mode != "auto":
        return mode
    if q.dtype in DTYPES and _alike(q, k, v):
        tokens, kind = min(q.shape[2], k.shape[2]), kind_of(mask, causal)
        grouped = q.shape[1] != k.shape[1]
        found = _starts(q.device, _head_size(q), kind, bits_min, rotate, grouped)
        for tokens_min, way in found:
            if tokens >= tokens_min:
                return way
    return SDPA


def refusal(way: str, q, k, v, mask=None, causal: bool = False) -> str | None:
    """Return why a way cannot run a call, or None."""
    if way == SDPA:
        return None
    if not _alike(q, k, v):
        return f"{way}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit"
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        return f"{way}: the mask is {mask.dtype}; bool or a float dtype is wanted"
    kind = (PLAIN if mask is None else MASKED) + (CAUSAL if causal else PLAIN)
    reason = _unmet(way, f"{ways.named(q.dtype)}{kind}", q.device, _head_size(q))
    if reason is None and causal and not way.startswith(LOWBIT) and q.shape[2] != k.shape[2]:
        return f"{way}: causal wants as many keys as queries"
    return reason


def missing(mode: str, device: torch.device) -> str | None:
    """Return why `mode` can run nothing on `device`, such as a package, or None.

    Raises what `known` raises.
    """
    way = known(mode)
    if way in ("auto", SDPA):
        return None
    return _unmet(way, ways.named(torch.bfloat16), device, 128)


def check_runs(mode: str, device: torch.device) -> None:
    """Raise NoBackendError where `mode` can run nothing on `device`.

    Logs it where `auto` takes nothing there as nothing was measured. Raises what `known` raises.
    """
    if reason := missing(mode, device):
        raise NoBackendError(reason)
    if known(mode) == "auto":
        auto.tell_of_unmeasured(device)


def _alike(q, k, v) -> bool:
    """Return whether shapes and dtypes are those of one attention, grouped heads included."""
    fits = k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    return fits and q.shape[1] % max(k.shape[1], 1) == 0 and q.dtype == k.dtype == v.dtype


def _head_size(q: torch.Tensor) -> int:
    """Return the head size as a number, of which torch.compile makes no symbol."""
    return operator.index(q.shape[3])


# A constant of the graph: torch.compile can trace neither the imports nor the self-tests.
@torch.compiler.assume_constant_result
def _starts(
    device: torch.device,
    head_size: int,
    kind: str | None,
    bits_min: int,
    rotate: bool,
    grouped: bool,
) -> tuple[tuple[int, str], ...]:
    """Return what `auto` takes: least tokens, and the way."""
    found = auto.starts(device, head_size, kind, bits_min, rotate, grouped)
    return tuple((start.tokens_min, start.way) for start in found)


@torch.compiler.assume_constant_result
def _unmet(way: str, kind: str, device: torch.device, head_size: int) -> str | None:
    """Return why none of the sets of needs of a way holds, or None."""
    return ways.unmet(way, kind, device, head_size)


def _run(q, k, v, mask, way, causal, scale, checked, rotate, *steps):
    compute = next(b.run for b in registry.backends(OP) if b.name == way)
    call = (q, k, v, mask, causal, scale)
    with on_gpu_of(q):
        out = guard.run(way, compute, checked, *call, of_arguments(*steps), rotate)
    # Every way's result lies in memory as q does, which a compiled graph relies on.
    if q.stride(1) < q.stride(2):
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def _empty(q, k, v, mask, way, causal, scale, checked, rotate, *steps):
    return empty_out(q)


_ROUTED = custom_op(
    "routed_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, str way, bool causal, "
    f"float? scale, str guard, bool rotate, {ARGUMENTS}) -> Tensor",
    _run,
    _empty,
)
