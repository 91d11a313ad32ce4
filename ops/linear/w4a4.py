"""W4A4 of MXFP4 weights: the activation is rounded to MXFP4 as well, both multiplied as they are.

EXPERIMENTAL: on FP4 tensor cores alone, which have not run it; tried there before its first use.
"""

import dataclasses

import torch
from comfy_kitchen.float_utils import to_blocked
from comfy_kitchen.tensor import QuantizedTensor

from .. import block_scales
from ..decode_fp4 import MXFP4_GROUP
from ..failures import failures
from ..mxfp4_mm import SCHEME, mxfp4_mm
from ..mxfp4_mm.triton import NEEDS
from ..registry import Backend, register
from .four_bit import four_bit

# The trial's shape, which no tile divides, and the relative error allowed: sums in another order.
TRIAL = (72, 150, 290)
TRIAL_MAX_ERROR = 0.01


def run(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, backend="triton"):
    """Return x' · Wᵀ + bias for floats [M, K], x' as `mxfp4_mm` rounds x. backend: of that."""
    w = four_bit(weight)
    return mxfp4_mm(x, w.packed, w.scale, w.shape, bias, backend)


def self_test(device: torch.device) -> str | None:
    """Return why the kernel cannot be trusted on `device`, or None when it can."""
    m, n, k = TRIAL
    columns = -(-k // MXFP4_GROUP) * MXFP4_GROUP
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, columns, generator=generator) for rows in (m, n))
    packed, plain = block_scales.mxfp4(w)
    given = (x[:, :k].bfloat16(), packed, to_blocked(plain.view(torch.uint8)))
    want = mxfp4_mm(*given, (n, k), backend="reference").double()
    try:
        got = mxfp4_mm(*(t.to(device) for t in given), (n, k), backend="triton").cpu().double()
    except failures() as error:
        return f"fails here: {type(error).__name__}: {error}"
    wrong = ((got - want).norm() / want.norm()).item()
    # Not `>`, which NaN would pass.
    return None if wrong <= TRIAL_MAX_ERROR else f"errs by {wrong:.2f} here"


needs = dataclasses.replace(NEEDS, schemes=frozenset({SCHEME}), self_test=self_test)
register(Backend("linear", "w4a4", 16, needs, run))
