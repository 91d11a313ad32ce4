"""SageAttention's packages, called so that nothing of the caller's is written to.

Read in `thu-ml/SageAttention`: `sageattention/core.py` of 1.0.6 (PyPI) and of commit d1a57a5 (2.2),
and `sageattention3_blackwell/sageattn3/api.py` of the same commit. What their functions take:

- `sageattn` 1.x: heads of 64, 96 and 128 channels; subtracts the mean from the caller's K in place,
  as 2.0.0 does. 2.0.1 and later: heads of up to 128.
- `sageattn3_blackwell`: heads of 64 and 128, as many of K as of Q; no mask (one is ignored), no
  scale; subtracts the mean from the caller's K in place, and makes a float32 matrix of
  Lq / 128 · Lk for every head.

The CUDA kernels of 2.x are launched on the default stream of the GPU, whichever is the current one.
On compute capability 8.6 it takes Triton's, which are not, as those of 1.x; neither are 3's.
"""

import functools
import importlib.metadata
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..registry import NoBackendError, capability

K_MAX = 128
HEAD_SIZES_1 = (64, 96, 128)
HEAD_SIZES_3 = (64, 128)
# The first version of `sageattention` that leaves K alone.
KEEPS_K = (2, 0, 1)
# Where 2.x takes its Triton kernels.
TRITON_IN_2 = (8, 6)
# Queries that share a row of SageAttention 3's matrix, and the bytes of it at a time.
BLOCK = 128
MATRIX_BYTES = 2**30


@functools.cache
def _version() -> tuple[int, ...]:
    """Return the version of `sageattention`, (0,) where it does not say."""
    try:
        text = importlib.metadata.version("sageattention")
    except importlib.metadata.PackageNotFoundError:
        return (0,)
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0]))


def _padded(head_sizes: tuple[int, ...], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors with zeros up to the next head size, or as they are, channels side by side."""
    d = tensors[0].shape[-1]
    size = min(s for s in head_sizes if s >= d)
    if size != d:
        return [F.pad(x, (0, size - d)) for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _leaves_stream(device: torch.device) -> bool:
    """Return whether kernels go to the default stream: those in CUDA C++, of 2.x or who knows."""
    return device.type == "cuda" and _version()[0] != 1 and capability(device) != TRITON_IN_2


def _in_order(run: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return run(), on the default stream: after what the current stream did, before what it does.

    Raises NoBackendError while a CUDA graph is recorded, which would not have it.
    """
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if torch.cuda.is_current_stream_capturing():
        raise NoBackendError(
            "sageattn: SageAttention 2 launches on the default stream, which a CUDA graph does not "
            "record; take another way of attention, or no CUDA graph"
        )
    if current == default:
        return run()
    default.wait_stream(current)
    with torch.cuda.stream(default):
        out = run()
    current.wait_stream(default)
    # Its memory is the default stream's.
    out.record_stream(current)
    return out


def sageattn(q, k, v, mask, causal: bool, scale: float | None) -> torch.Tensor:
    """Return attention by SageAttention 1 or 2; q [B, H, Lq, D], k and v [B, Hkv, Lk, D].

    Raises NoBackendError for 2.x while a CUDA graph is recorded.
    """

    def run() -> torch.Tensor:
        return _sageattn(q, k, v, causal, scale)

    return _in_order(run, q.device) if _leaves_stream(q.device) else run()


def _sageattn(q, k, v, causal: bool, scale: float | None) -> torch.Tensor:
    import sageattention

    d = q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if _version() < KEEPS_K:
        k = k.clone()
    q, k, v = _padded(HEAD_SIZES_1, q, k, v)
    out = sageattention.sageattn(q, k, v, tensor_layout="HND", is_causal=causal, sm_scale=scale)
    return out[..., :d]


def sageattn3(q, k, v, mask, causal: bool, scale: float | None) -> torch.Tensor:
    """Return attention in FP4 by SageAttention 3; q [B, H, Lq, D], k and v [B, Hkv, Lk, D].

    Some heads at a time, so that its matrices stay within MATRIX_BYTES where one head's do.
    """
    import sageattn3 as package

    (b, heads, queries, d), keys = q.shape, k.shape[2]
    group = heads // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    size = min(s for s in HEAD_SIZES_3 if s >= d)
    # It scales by size**-0.5.
    factor = 1.0 if scale is None else scale * d**0.5
    factor *= (size / d) ** 0.5
    bytes_of_head = b * -(-queries // BLOCK) * (keys + BLOCK) * 4
    step = max(1, MATRIX_BYTES // bytes_of_head)
    parts = []
    for first in range(0, heads, step):
        some = (x[:, first : first + step] for x in (q, k, v))
        q_some, k_some, v_some = _padded(HEAD_SIZES_3, *some)
        if factor != 1.0:
            q_some = q_some * factor
        # A copy: its mean is subtracted in place.
        parts.append(package.sageattn3_blackwell(q_some, k_some.clone(), v_some)[..., :d])
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
