"""Attention layers of the host whose norm and rotary embedding of q and k join the attention.

A layer is replaced by a copy that has the same children. Where our attention does not take a call,
or another patch wants q and k as the host has them, the host's own code runs.
Source: ComfyUI 0.33 comfy/ldm/wan/model.py, comfy/ldm/qwen_image/model.py.
"""

import logging
from collections.abc import Callable
from types import CodeType

import torch

from ..ops.attention.prologue import HEAD, TOKEN, Prologue
from ..quant import fusion
from .attention_override import Override, read_call, with_prologue

logger = logging.getLogger(__name__)

# (norm, like) -> context in which its weight is on the device of `like`: (weight, None).
Weights = Callable[[torch.nn.Module, torch.Tensor], object]


class FusedAttention(fusion.Fused):
    """Mixed into the class of an attention layer of the host."""

    _fusion: Weights


def _override(like, heads: int, transformer_options: dict) -> Override | None:
    """Return the override that takes such a layer's self-attention whole, or None."""
    if "attn1_patch" in transformer_options.get("patches", {}):
        return None
    return with_prologue(like, heads, transformer_options)


def _tables(freqs, tokens: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
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


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(override: Override, q, k, v, heads: int, options: dict, prologue) -> torch.Tensor:
    """Return the attention of q, k and v, all [B, L, H·D]."""
    call = read_call(q, k, v, heads=heads, transformer_options=options)
    return override.attend(call, prologue).transpose(1, 2).flatten(2)


class WanSelfAttention(FusedAttention):
    """Of Wan: the norm is over all heads of a token."""

    NORMS = ("norm_q", "norm_k")

    def forward(self, x, freqs, transformer_options={}):  # noqa: B006 (the host's signature)
        """Return self-attention of x [B, L, C]; freqs: as `_tables` reads them."""
        heads = self.num_heads
        tables = _tables(freqs, x.shape[1], self.head_dim)
        override = _override(x, heads, transformer_options) if tables else None
        if override is None:
            return super().forward(x, freqs, transformer_options=transformer_options)
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights, eps = self._fusion, self.norm_q.eps
        with weights(self.norm_q, x) as (of_q, _), weights(self.norm_k, x) as (of_k, _):
            prologue = Prologue(TOKEN, eps, of_q, of_k, 0, *tables)
            out = _attend(override, q, k, v, heads, transformer_options, prologue)
        return self.o(out)


class QwenAttention(FusedAttention):
    """Of Qwen-Image: text and image together, the norm over a head, with weights for either."""

    NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        encoder_hidden_states_mask=None,
        attention_mask=None,
        image_rotary_emb=None,
        transformer_options={},  # noqa: B006
    ):
        """Return attention of the image's tokens [B, L, C] and of the text's [B, T, C]."""
        image, text = hidden_states, encoder_hidden_states
        length = text.shape[1] + image.shape[1]
        tables, override = _tables(image_rotary_emb, length, self.dim_head), None
        if tables and encoder_hidden_states_mask is None:
            like = image[:, :1].expand(-1, length, -1)
            override = _override(like, self.heads, transformer_options)
        if override is None:
            return super().forward(
                image,
                text,
                encoder_hidden_states_mask,
                attention_mask,
                image_rotary_emb,
                transformer_options=transformer_options,
            )
        q, k, v = (
            torch.cat((of_text(text), of_image(image)), dim=1)
            for of_text, of_image in (
                (self.add_q_proj, self.to_q),
                (self.add_k_proj, self.to_k),
                (self.add_v_proj, self.to_v),
            )
        )
        prologue = Prologue(
            *(HEAD, self.norm_q.eps, self._weight(q, "q"), self._weight(k, "k"), text.shape[1]),
            *tables,
        )
        out = _attend(override, q, k, v, self.heads, transformer_options, prologue)
        of_text, of_image = out.split((text.shape[1], image.shape[1]), dim=1)
        return self.to_out[1](self.to_out[0](of_image)), self.to_add_out(of_text)

    def _weight(self, like: torch.Tensor, name: str) -> torch.Tensor:
        """Return the norms' weights of q or k, [2, D]: the text's, which stands first, the image's.

        Copies, since what the host lends ends with the context.
        """
        norms = getattr(self, f"norm_added_{name}"), getattr(self, f"norm_{name}")
        weights = self._fusion
        with weights(norms[0], like) as (first, _), weights(norms[1], like) as (second, _):
            return torch.stack((first, second))


# The host's classes -> what is mixed into them, and the names that the host's own forward uses.
# Another version of it may do more, and then stays as it is.
KNOWN = {
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


def fused(plain: torch.nn.Module, weights: Weights) -> torch.nn.Module:
    """Return a copy of an attention layer of the host, with the same children, that may be fused.

    weights: gives a norm's weight where it is computed with. Returns `plain` itself where it is of
    another class, or of another version of it, or its norms differ from what we compute.
    """
    kind = type(plain)
    mixin, names = KNOWN.get(f"{kind.__module__}.{kind.__qualname__}", (None, ""))
    if mixin is None:
        return plain
    if unknown := _names(kind.forward.__code__) - set(names.split()):
        logger.info(
            "LowBit attention: this ComfyUI's %s also uses %s; norm and rotary embedding stay "
            "before the attention",
            *(kind.__qualname__, ", ".join(sorted(unknown))),
        )
        return plain
    norms = [getattr(plain, name) for name in mixin.NORMS]
    alike = all(isinstance(n, torch.nn.RMSNorm) and n.weight is not None for n in norms)
    if not alike or norms[0].eps is None or len({norm.eps for norm in norms}) > 1:
        return plain
    return fusion.copied(plain, mixin, weights)


def _names(code: CodeType) -> set[str]:
    """Return the names of attributes and globals that a function and those within it use."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))
