"""`attention_fp4` by our Triton kernel, on GPUs with FP4 tensor cores. Runs when named."""

import math

import torch

from ..registry import BY_NAME, Backend, Needs, register
from . import OP, SCHEME
from .prepare import TILE, prepare
from .reference import KEYS

LOG2E = math.log2(math.e)
WARPS = 4
STAGES = 2


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Return what `attention_fp4` describes."""
    from .kernel import attend_kernel

    b, h, length, d = q.shape
    prepared = prepare(q, k, v)
    out = torch.empty(b * h, length, d, dtype=q.dtype, device=q.device)
    tiles, padded = prepared.correction.shape[1:]
    launched = attend_kernel[(tiles, b * h)]
    with torch.cuda.device_of(q):
        launched(
            *prepared.q,
            *prepared.k,
            *prepared.v,
            prepared.correction,
            out,
            out.stride(0),
            out.stride(1),
            prepared.logit_scale * (scale * LOG2E),
            prepared.v_scale,
            0.0,
            length,
            k.shape[2],
            padded,
            h // k.shape[1],
            M=TILE,
            N=KEYS,
            D=d,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out.view(b, h, length, d)


NEEDS = Needs(
    frozenset({SCHEME}),
    devices=frozenset({"cuda"}),
    capability=(10, 0),
    # No GPU that has the instructions has measured it.
    measured=BY_NAME,
    package="triton",
    package_min=(3, 6),
)
register(Backend(OP, "triton", 10, NEEDS, run))
