"""The float32 product on a GPU: the weight decoded, then torch's own product, then the scale."""

import torch
import torch.nn.functional as F

from ..decode_fp4 import decode_fp4
from ..registry import Backend, Needs, register
from . import OP


def run(x, packed, scale, tensor_scale, bias, n, group) -> torch.Tensor:
    """Return the product as `fp4_mm` describes it, for float32."""
    k = x.shape[1]
    out = F.linear(x, decode_fp4(packed, scale, (n, k), group, x.dtype)[:, :k])
    if tensor_scale is not None:
        out *= tensor_scale
    return out if bias is None else out.add_(bias)


SCHEMES = frozenset({"nvfp4_32", "mxfp4_32"})
register(Backend(OP, "torch", 30, Needs(SCHEMES, devices=frozenset({"cuda"})), run))
