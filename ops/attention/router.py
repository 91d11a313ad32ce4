"""The router: one attention by many ways, by name or by what was measured (`table.py`).

Each way registers with its needs, like the backends of an operation. Its schemes are dtypes, with
`_masked` or `_causal` after them.
"""

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import registry, tuning
from ..registry import Backend, Call, Needs, NoBackendError, register
from . import OP as ATTENTION
from . import attention, scheme
from .check import DTYPES
from .modes import MODES
from .table import AUTO

OP = "attention router"
SDPA = "sdpa"
PLAIN, MASKED, CAUSAL, BOTH = "", "_masked", "_causal", "_masked_causal"
# The names of older wrappers for what is here under another one, or not at all.
ALIASES = {"sageattn_3_fp8": "lowbit_fp8"}
NOT_BUILT = {"sageattn_3_fp4": "attention in FP4 is not built yet; choose lowbit_fp8"}


def route(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mode: str = "auto",
    *,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Return softmax(scale · q·kᵀ + mask) · v, [B, H, Lq, D], in the dtype of q.

    q: [B, H, Lq, D]; k, v: [B, Hkv, Lk, D] with H % Hkv = 0, of one dtype, any strides, never
    written to. mask: bool (True: the key counts) or added to the logits, broadcast to
    [B, H, Lq, Lk]. scale: None is D**-0.5. mode: one of NAMES, or an older name of ALIASES.
    `auto` takes what `table.py` has for the call, else torch's own attention. On a CPU a `lowbit_*`
    mode runs the exact reference of `attention`, on float32 rounded to bfloat16.
    Raises ValueError for an unknown mode, NoBackendError with the reason where the named one cannot
    run the call.
    """
    way = choose(q, k, v, mode, mask, causal)
    reason = refusal(way, q, k, v, mask, causal)
    if reason:
        raise NoBackendError(f"{OP}: {reason}")
    run = next(b.run for b in registry.backends(OP) if b.name == way)
    return run(q, k, v, mask, causal, scale)


def choose(q, k, v, mode: str, mask=None, causal: bool = False) -> str:
    """Return the name of the way that `mode` means for a call: itself, but for `auto`.

    Raises ValueError for an unknown mode and NoBackendError for one that is not built.
    """
    if mode in NOT_BUILT:
        raise NoBackendError(f"{OP}: {mode}: {NOT_BUILT[mode]}")
    mode = ALIASES.get(mode, mode)
    if mode not in NAMES:
        raise ValueError(f"{OP}: unknown mode {mode!r}; known are {', '.join(NAMES)}")
    if mode != "auto":
        return mode
    plain = mask is None and not causal and q.dtype in DTYPES and _alike(q, k, v)
    if plain:
        tokens = min(q.shape[2], k.shape[2])
        for index, row in enumerate(AUTO):
            if tokens >= row.tokens_min and _fits(index, q.device, q.shape[3]):
                return row.way
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
    return _unmet(way, f"{_named(q.dtype)}{kind}", q.device, q.shape[3])


def missing(mode: str, device: torch.device) -> str | None:
    """Return why `mode` can run nothing on `device`, such as a package, or None.

    Raises ValueError for an unknown mode and NoBackendError for one that is not built.
    """
    mode = ALIASES.get(mode, mode)
    empty = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device="meta")
    way = choose(empty, empty, empty, mode)
    return None if way == SDPA else _unmet(way, _named(torch.bfloat16), device, 128)


def _alike(q, k, v) -> bool:
    """Return whether shapes and dtypes are those of one attention, grouped heads included."""
    fits = k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    return fits and q.shape[1] % max(k.shape[1], 1) == 0 and q.dtype == k.dtype == v.dtype


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# A constant of the graph: torch.compile can trace neither the imports nor the self-tests.
@torch.compiler.assume_constant_result
def _fits(index: int, device: torch.device, head_size: int) -> bool:
    """Return whether a row of AUTO has this device and head size, and its kernel runs there."""
    return _look_up(index, device, head_size)


@torch.compiler.assume_constant_result
def _unmet(way: str, kind: str, device: torch.device, head_size: int) -> str | None:
    """Return why none of the sets of needs of a way holds, or None."""
    return _reason(way, kind, device, head_size)


@tuning.cached
def _look_up(index: int, device: torch.device, head_size: int) -> bool:
    row, has = AUTO[index], registry.capability(device)
    if has is None or not row.capability[0] <= has < row.capability[1]:
        return False
    if head_size != row.head_size:
        return False
    mode = row.way.removeprefix("lowbit_")
    call = Call(scheme(mode, False), device, 0, head_size)
    found = [b for b in registry.backends(ATTENTION) if b.name == row.backend]
    return any(registry.unmet(b.needs, call) is None for b in found)


@tuning.cached
def _reason(way: str, kind: str, device: torch.device, head_size: int) -> str | None:
    call = Call(kind, device, 0, head_size)
    reasons = []
    for backend in registry.backends(OP):
        if backend.name == way:
            reason = registry.unmet(backend.needs, call)
            if reason is None:
                return None
            reasons.append((reason.startswith("needs a device"), reason))
    # Of several, a reason that is not the device says more.
    return f"{way}: {min(reasons)[1]}"


def _schemes(*kinds: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> frozenset[str]:
    return frozenset(f"{_named(dtype)}{kind}" for dtype, kind in product(dtypes, kinds))


def _sdpa(q, k, v, mask, causal: bool, scale: float | None) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def _cudnn(q, k, v, mask, causal, scale) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v, mask, causal, scale)


def _lowbit(mode: str) -> Callable:
    def run(q, k, v, mask, causal, scale) -> torch.Tensor:
        dtype = q.dtype
        # Float32 gets here on a CPU alone.
        if dtype not in DTYPES:
            q, k, v = (x.bfloat16() for x in (q, k, v))
        return attention(q, k, v, mode, mask=mask, causal=causal, scale=scale).to(dtype)

    return run


def _kitchen(q, k, v, mask, causal, scale) -> torch.Tensor:
    import comfy_kitchen

    return comfy_kitchen.int8_attention(q, k, v, scale=scale, attn_mask=mask)


def _kitchen_missing(device: torch.device) -> str | None:
    import comfy_kitchen

    available = getattr(comfy_kitchen, "int8_attention_is_available", None)
    if available is None:
        return "this comfy_kitchen has no INT8 attention"
    return None if available() else "comfy_kitchen's INT8 attention does not run on this GPU"


def _sage(q, k, v, mask, causal, scale) -> torch.Tensor:
    import sageattention

    return sageattention.sageattn(q, k, v, tensor_layout="HND", is_causal=causal, sm_scale=scale)


def _register(name: str, run: Callable, schemes: frozenset[str], **needs) -> None:
    rank = len(registry.backends(OP))
    register(Backend(OP, name, rank, Needs(schemes, **needs), run))


CUDA, CPU = frozenset({"cuda"}), frozenset({"cpu"})
ALL = (PLAIN, MASKED, CAUSAL, BOTH)
FLOATS = (*DTYPES, torch.float32, torch.float64)
_register(SDPA, _sdpa, _schemes(*ALL, dtypes=FLOATS))
_cudnn_takes = _schemes(PLAIN, MASKED, CAUSAL)
_register("cudnn", _cudnn, _cudnn_takes, devices=CUDA, capability=(8, 0), k_multiple=8, k_max=256)
for _mode in MODES.values():
    _name = f"lowbit_{_mode.name}"
    _register(
        *(_name, _lowbit(_mode.name), _schemes(*ALL)),
        **{"devices": CUDA, "capability": _mode.capability, "k_max": 256, "package": "triton"},
    )
    _on_cpu = _schemes(*ALL, dtypes=(*DTYPES, torch.float32))
    _register(_name, _lowbit(_mode.name), _on_cpu, devices=CPU)
_register(
    *("kitchen_int8", _kitchen, _schemes(PLAIN, MASKED)),
    **{"devices": CUDA, "k_max": 256, "package": "comfy_kitchen", "self_test": _kitchen_missing},
)
_register(
    *("sageattn", _sage, _schemes(PLAIN, CAUSAL)),
    **{"devices": CUDA, "capability": (8, 0), "k_max": 128, "package": "sageattention"},
)
# What may be asked for.
NAMES = ("auto", *dict.fromkeys(backend.name for backend in registry.backends(OP)))
