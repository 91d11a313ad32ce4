"""What `attention` accepts, checked before any kernel runs."""

import torch

from .modes import MODES

DTYPES = (torch.bfloat16, torch.float16)
# Programs of one launch are counted in 32 bits, and rows in each program too.
MAX_TOKENS = 2**30


def check(q, k, v, mode, mask, scale) -> None:
    """Raise TypeError or ValueError when arguments of `attention` do not fit together."""
    if mode not in MODES:
        raise ValueError(f"attention: unknown mode {mode!r}; known are {', '.join(MODES)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"attention: {name} is {list(x.shape)}; [batch, heads, tokens, head size] is wanted"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"attention: {name} is {x.dtype}; cast it to bfloat16 or float16")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"attention: {name} is {x.dtype} on {x.device}, q {q.dtype} on {q.device}; "
                "bring all to one dtype and device"
            )
        if x.shape[2] > MAX_TOKENS:
            raise ValueError(f"attention: {name} has {x.shape[2]} tokens, at most {MAX_TOKENS}")
    _check_shapes(q, k, v, mask)
    if scale is not None and not scale > 0:
        raise ValueError(f"attention: scale is {scale}; it must be positive")


def _check_shapes(q, k, v, mask) -> None:
    b, heads, length, d = q.shape
    if k.shape != v.shape or k.shape[0] != b or k.shape[3] != d:
        raise ValueError(
            f"attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; k and v must be "
            f"alike, with batch {b} and head size {d}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"attention: {heads} heads of q do not divide among {k.shape[1]} of k and v"
        )
    if mask is None:
        return
    want = (b, heads, length, k.shape[2])
    if mask.dim() > 4 or any(
        size not in (1, full) for size, full in zip(mask.shape[::-1], want[::-1], strict=False)
    ):
        raise ValueError(f"attention: mask {list(mask.shape)} does not broadcast to {list(want)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attention: mask is {mask.dtype}; bool or a float dtype is wanted")
    if mask.device != q.device:
        raise ValueError(f"attention: mask is on {mask.device}, q on {q.device}")
