"""Layers of the host whose steps join our kernels: norm, modulation, rotary embedding, gate.

A layer is replaced by a copy of the same children below its own class. Where ours take no call,
or another patch wants what lies between, the host's own code runs.
Source: ComfyUI 0.33 comfy/ldm/wan/model.py, comfy/ldm/qwen_image/model.py.
"""

import logging
from types import CodeType

import torch

from ...quant import fusion
from .base import Host
from .qwen_image import QwenAttention, QwenBlock
from .wan import WanBlock, WanSelfAttention

logger = logging.getLogger(__name__)

# The host's classes -> what is mixed into them, and the names that the host's own forward uses.
# Another version of it may do more, and then stays as it is.
ATTENTION = {
    "comfy.ldm.wan.model.WanSelfAttention": (
        WanSelfAttention,
        "apply_rope1 get head_dim k norm_k norm_q num_heads o optimized_attention q shape v view",
    ),
    "comfy.ldm.qwen_image.model.Attention": (
        QwenAttention,
        "add_k_proj add_q_proj add_v_proj apply_rope1 cat contiguous copy device dtype get heads "
        "norm_added_k norm_added_q norm_k norm_q optimized_attention_masked shape to_add_out to_k "
        "to_out to_q to_v torch transpose view zeros",
    ),
}
BLOCKS = {
    "comfy.ldm.wan.model.WanAttentionBlock": (
        WanBlock,
        "addcmul cast_to chunk comfy contiguous cross_attn device dtype ffn get model_management "
        "modulation ndim norm1 norm2 norm3 repeat_e self_attn torch unbind unsqueeze",
    ),
    "comfy.ldm.qwen_image.model.QwenImageTransformerBlock": (
        QwenBlock,
        "_apply_gate _modulate addcmul attn chunk img_mlp img_mod img_norm1 img_norm2 torch "
        "txt_mlp txt_mod txt_norm1 txt_norm2",
    ),
}


def fused(plain: torch.nn.Module, known: dict, host: Host) -> torch.nn.Module:
    """Return a copy of a layer of the host, with the same children, that may be fused.

    known: ATTENTION or BLOCKS. Returns `plain` itself where it is of another class, or of another
    version of it, or computes something else than the copy would.
    """
    kind = type(plain)
    mixin, names = known.get(f"{kind.__module__}.{kind.__qualname__}", (None, ""))
    if mixin is None or not mixin.fits(plain):
        return plain
    if unknown := _names(kind.forward.__code__) - set(names.split()):
        logger.info(
            "LowBit: this ComfyUI's %s also uses %s; it runs as ComfyUI has it",
            *(kind.__qualname__, ", ".join(sorted(unknown))),
        )
        return plain
    return fusion.copied(plain, mixin, host)


def _names(code: CodeType) -> set[str]:
    """Return the names of attributes and globals that a function and those within it use."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))
