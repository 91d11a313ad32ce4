"""Attention layers whose norm and rotary embedding of q and k join the attention."""

from collections.abc import Sequence

import torch

from ...ops.attention.prologue import Prologue
from ..attention_override import Override, read_call, with_prologue

# q, k and v, [B, L, H·D] each.
Projections = Sequence[torch.Tensor]


def override_for(like: torch.Tensor, heads: int, transformer_options: dict) -> Override | None:
    """Return the override that takes a layer's self-attention whole, or None.

    like: as q, k and v are to be, [B, L, H·D].
    """
    # There are no gradients, and patches get q and k as the host has them.
    if torch.is_grad_enabled() or "attn1_patch" in transformer_options.get("patches", {}):
        return None
    return with_prologue(like, heads, transformer_options)


def tables(freqs, tokens: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return cos and sin [tokens, D / 2] of the host's rotary embedding, or None.

    freqs: [1, L, 1, D / 2, 2, 2] or with tokens and heads in the other order, one for all heads.
    """
    if not torch.is_tensor(freqs) or freqs.dim() != 6:
        return None
    if freqs.shape[3:] != (head_size // 2, 2, 2) or freqs.shape[:3].numel() != tokens:
        return None
    if freqs.shape[0] != 1 or tokens not in freqs.shape[1:3]:
        return None
    cos, sin = freqs[..., 0].reshape(tokens, head_size // 2, 2).movedim(-1, 0).contiguous()
    return cos, sin


def attend(
    override: Override,
    projections: Projections,
    heads: int,
    transformer_options: dict,
    prologue: Prologue,
) -> torch.Tensor:
    """Return the attention of q, k and v, all [B, L, H·D], after `prologue`."""
    call = read_call(*projections, heads=heads, transformer_options=transformer_options)
    return override.attend(call, prologue).transpose(1, 2).flatten(2)
