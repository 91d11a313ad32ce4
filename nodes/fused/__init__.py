"""Layers of the host whose steps join our kernels: norm, modulation, rotary embedding, gate.

A layer is replaced by a copy of the same children below its own class. Where ours take no call,
where another patch or hook wants what lies between, and in training, the host's own code runs.
Attention: of all Wans and of Qwen-Image, without a mask. Blocks: of Wan and VACE but those of other
classes, of Qwen-Image but with a mask.
Source: ComfyUI 0.33 comfy/ldm/wan/model.py, comfy/ldm/qwen_image/model.py.
"""

import functools
import logging
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CodeType

import torch

from ...quant import fusion
from .base import Host
from .qwen_image import QwenAttention, QwenBlock
from .wan import VaceBlock, WanBlock, WanSelfAttention

logger = logging.getLogger(__name__)

# The host's classes -> what is mixed into them, and the names that the host's own forward uses, its
# arguments first. Another version of it, or another pack's, may do more, and then stays as it is.
ATTENTION = {
    "comfy.ldm.wan.model.WanSelfAttention": (
        WanSelfAttention,
        "x freqs transformer_options",
        "apply_rope1 get head_dim k norm_k norm_q num_heads o optimized_attention q shape v view",
    ),
    "comfy.ldm.qwen_image.model.Attention": (
        QwenAttention,
        "hidden_states encoder_hidden_states encoder_hidden_states_mask attention_mask "
        "image_rotary_emb transformer_options",
        "add_k_proj add_q_proj add_v_proj apply_rope1 cat contiguous copy device dtype get heads "
        "norm_added_k norm_added_q norm_k norm_q optimized_attention_masked shape to_add_out to_k "
        "to_out to_q to_v torch transpose view zeros",
    ),
}
BLOCKS = {
    "comfy.ldm.wan.model.WanAttentionBlock": (
        WanBlock,
        "x e freqs context context_img_len transformer_options",
        "addcmul cast_to chunk comfy contiguous cross_attn device dtype ffn get model_management "
        "modulation ndim norm1 norm2 norm3 repeat_e self_attn torch unbind unsqueeze",
    ),
    # Between two layers what its base class does, which is looked at too.
    "comfy.ldm.wan.model.VaceWanAttentionBlock": (
        VaceBlock,
        "c x **kwargs",
        "after_proj before_proj block_id forward super",
    ),
    "comfy.ldm.qwen_image.model.QwenImageTransformerBlock": (
        QwenBlock,
        "hidden_states encoder_hidden_states encoder_hidden_states_mask temb image_rotary_emb "
        "timestep_zero_index transformer_options",
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
    mixin = known.get(_name(kind), (None,))[0]
    if mixin is None:
        return plain
    if not _is_known(kind, known):
        _warn_of(kind.__qualname__)
        return plain
    return fusion.copied(plain, mixin, host) if mixin.fits(plain) else plain


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_known(kind: type, known: dict) -> bool:
    """Return whether a class, and that whose forward its own calls, are as when ours was made."""
    method, code = kind.forward, getattr(kind.forward, "__code__", None)
    if code is None or method.__module__ != kind.__module__ or _name(kind) not in known:
        return False
    _, arguments, names = known[_name(kind)]
    calls_base = "super" in names.split()
    # Python's own cell, for super().
    same = code.co_freevars == (("__class__",) if calls_base else ())
    same = same and _arguments(code) == arguments and _names(code) == set(names.split())
    return same and (not calls_base or _is_known(kind.__base__, known))


def _arguments(code: CodeType) -> str:
    """Return the arguments of a method as its table has them; the first one is self."""
    count = code.co_argcount + code.co_kwonlyargcount
    flags = (("*", CO_VARARGS), ("**", CO_VARKEYWORDS))
    # In this order they follow the others, in one count.
    stars = [star for star, flag in flags if code.co_flags & flag]
    more = zip(stars, code.co_varnames[count:], strict=False)
    words = [*code.co_varnames[1:count], *(star + name for star, name in more)]
    return " ".join(["*,", *words] if code.co_kwonlyargcount else words)


@functools.cache
def _warn_of(name: str) -> None:
    """Say once that a class is not the known one."""
    logger.warning(
        "LowBit: %s is another one than in ComfyUI 0.33, or changed by another pack: its steps run "
        "as they are there, outside of our kernels",
        name,
    )


def _names(code: CodeType) -> set[str]:
    """Return the names of attributes and globals that a function and those within it use."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))
