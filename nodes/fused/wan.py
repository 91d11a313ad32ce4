"""Wan: self-attention with a norm over all heads of a token, and the block around it."""

from collections.abc import Callable

import torch

from ...ops.attention.prologue import TOKEN, Prologue
from .attention import Projections, attend, override_for, tables
from .base import (
    Layer,
    Modulated,
    are_of_known_classes,
    are_untouched,
    gated,
    have_one_eps,
    is_plain_norm,
    run_feed_forward,
)


class WanSelfAttention(Layer):
    """Self-attention; its norm and rotary embedding join the attention."""

    @classmethod
    def fits(cls, plain) -> bool:
        """Return whether the norms are RMS norms alike."""
        return have_one_eps((plain.norm_q, plain.norm_k))

    def forward(self, x, freqs, transformer_options={}):  # noqa: B006 (the host's signature)
        """Return self-attention of x [B, L, C]; freqs: as `tables` reads them."""
        out = self.attend(x, freqs, transformer_options, lambda: (self.q(x), self.k(x), self.v(x)))
        if out is None:
            return super().forward(x, freqs, transformer_options=transformer_options)
        return self.o(out)

    def attend(
        self, like, freqs, transformer_options: dict, project: Callable[[], Projections]
    ) -> torch.Tensor | None:
        """Return what goes to the layer `o`, or None where the host's own code is to run.

        like: [B, L, C], as q, k and v that `project` gives.
        """
        norms, found = (self.norm_q, self.norm_k), None
        if are_untouched(*norms):
            found = tables(freqs, like.shape[1], self.head_dim)
        override = override_for(like, self.num_heads, transformer_options) if found else None
        if override is None:
            return None
        projections = project()
        weights = (self._fusion.norm_weight(norm, like) for norm in norms)
        prologue = Prologue(TOKEN, self.norm_q.eps, *weights, 0, *found)
        return attend(override, projections, self.num_heads, transformer_options, prologue)


class _Block(Layer):
    """What blocks have in common: modulated norms join quantizers, gates and residuals products."""

    @classmethod
    def fits(cls, plain) -> bool:
        """Return whether its norms have no weights and its GELU is the tanh one."""
        norms = is_plain_norm(plain.norm1) and is_plain_norm(plain.norm2)
        if not norms or not are_of_known_classes(plain.ffn) or len(plain.ffn) != 3:
            return False
        linear = all(hasattr(layer, "in_features") for layer in _layers(plain.ffn))
        return linear and getattr(plain.ffn[1], "approximate", None) == "tanh"

    def joined(
        self,
        x,
        e,
        freqs,
        context,
        context_img_len=257,
        transformer_options={},  # noqa: B006
    ) -> torch.Tensor | None:
        """Return the block of x [B, L, C], or None where the host's own code is to run.

        e: [B, 6, C], or [B, T, 6, C], each for L / T tokens.
        """
        e = e.unsqueeze(1) if e.ndim == 3 else e
        if e.shape[0] != x.shape[0] or x.shape[1] % e.shape[1] or torch.is_grad_enabled():
            return None
        host, x = self._fusion, x.contiguous()
        modulation = (host.cast(self.modulation, x).unsqueeze(0) + e).unbind(2)
        x = self._attend(x, *modulation[:3], freqs, transformer_options)
        x = x + self.cross_attn(
            self.norm3(x),
            context,
            context_img_len=context_img_len,
            transformer_options=transformer_options,
        )
        for patch in transformer_options.get("patches", {}).get("attn2_patch", ()):
            x = patch({"x": x, "transformer_options": transformer_options})
        shift, scale, gate = modulation[3:]
        given = Modulated(x.contiguous(), self.norm2, shift, scale)
        # ComfyUI does not call the layer between the two either.
        return run_feed_forward(host, self.ffn, _layers, lambda ffn: (), given, gate)

    def _attend(self, x, shift, scale, gate, freqs, transformer_options: dict) -> torch.Tensor:
        """Return x + gate · self-attention of the modulated norm of x."""
        given, layer, out = Modulated(x, self.norm1, shift, scale), self.self_attn, None
        host = self._fusion
        if isinstance(layer, WanSelfAttention) and are_untouched(layer, self.norm1):
            readers = (layer.q, layer.k, layer.v)
            out = layer.attend(
                x, freqs, transformer_options, lambda: host.run_after(readers, given)
            )
        if out is None:
            y = layer(given.plain(), freqs, transformer_options=transformer_options)
            return gated(x, y, gate)
        return host.run(layer.o, out, None, gate, x)


class WanBlock(_Block):
    """A block of a model."""

    def forward(
        self,
        x,
        e,
        freqs,
        context,
        context_img_len=257,
        transformer_options={},  # noqa: B006
    ):
        """Return the block of x [B, L, C]; e: [B, 6, C], or [B, T, 6, C], each for L / T tokens."""
        given = (e, freqs, context, context_img_len, transformer_options)
        out = self.joined(x, *given)
        return super().forward(x, *given) if out is None else out


class VaceBlock(_Block):
    """A block of VACE's own: the same, between two layers."""

    def forward(self, c, x, **kwargs):
        """Return (what is added to the model's tokens, the block of c), both [B, L, C]."""
        out = self.joined(self.before_proj(c) + x if self.block_id == 0 else c, **kwargs)
        if out is None:
            return super().forward(c, x, **kwargs)
        return self.after_proj(out), out


def _layers(ffn: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    return ffn[0], ffn[2]
