"""Qwen-Image: attention of text and image together, the norm over a head, and the block."""

from collections.abc import Callable, Sequence

import torch

from ...ops.attention.prologue import HEAD, Prologue
from .attention import Projections, attend, override_for, tables
from .base import (
    Layer,
    Modulated,
    are_of_known_classes,
    are_untouched,
    have_one_eps,
    is_plain_norm,
    run_feed_forward,
)

# A name of its own, as torch.compile reads the annotations of a function within another.
Streams = Sequence[Projections]


class QwenAttention(Layer):
    """Joint attention; its norms and rotary embedding join the attention."""

    @classmethod
    def fits(cls, plain) -> bool:
        """Return whether the four norms are RMS norms alike."""
        return have_one_eps(cls.norms(plain))

    def norms(self) -> tuple[torch.nn.Module, ...]:
        """Return the norms of q and k, the image's and the text's."""
        return self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k

    @property
    def of_image(self) -> tuple[torch.nn.Module, ...]:
        """The layers that make q, k and v of the image's tokens."""
        return self.to_q, self.to_k, self.to_v

    @property
    def of_text(self) -> tuple[torch.nn.Module, ...]:
        """The layers that make q, k and v of the text's tokens."""
        return self.add_q_proj, self.add_k_proj, self.add_v_proj

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        encoder_hidden_states_mask=None,
        attention_mask=None,
        image_rotary_emb=None,
        transformer_options={},  # noqa: B006 (the host's signature)
    ):
        """Return attention of the image's tokens [B, L, C] and of the text's [B, T, C]."""
        image, text = hidden_states, encoder_hidden_states
        attend = None
        if encoder_hidden_states_mask is None:
            attend = self.attention(image, text, image_rotary_emb, transformer_options)
        if attend is None:
            return super().forward(
                image,
                text,
                encoder_hidden_states_mask,
                attention_mask,
                image_rotary_emb,
                transformer_options=transformer_options,
            )
        streams = (text, self.of_text), (image, self.of_image)
        of_text, of_image = attend([[layer(x) for layer in layers] for x, layers in streams])
        return self.to_out[1](self.to_out[0](of_image)), self.to_add_out(of_text)

    def attention(
        self, image, text, freqs, transformer_options: dict
    ) -> Callable[[Streams], tuple[torch.Tensor, torch.Tensor]] | None:
        """Return what makes attention, of the text and of the image, of q, k and v.

        It takes those of the text, then of the image, in one piece or several along its tokens.
        None where the host's own code is to run. image, text: [B, L, C] and [B, T, C], as q, k and
        v of either are.
        """
        first = text.shape[1]
        tokens = first + image.shape[1]
        found, override = None, None
        if are_untouched(*self.norms()):
            freqs = _of_one_item(freqs, transformer_options)
            found = tables(freqs, tokens, self.dim_head)
        if found:
            like = image[:, :1].expand(-1, tokens, -1)
            override = override_for(like, self.heads, transformer_options)
        if override is None:
            return None

        def run(streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v = (torch.cat(pieces, dim=1) for pieces in zip(*streams, strict=True))
            weights = self._weights("q", q), self._weights("k", k)
            prologue = Prologue(HEAD, self.norm_q.eps, *weights, first, *found)
            out = attend(override, (q, k, v), self.heads, transformer_options, prologue)
            return out[:, :first], out[:, first:]

        return run

    def _weights(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return the norms' weights of q or k, [2, D]: the text's, as its tokens, stand first."""
        norms = getattr(self, f"norm_added_{name}"), getattr(self, f"norm_{name}")
        return torch.stack([self._fusion.norm_weight(norm, like) for norm in norms])


def _of_one_item(freqs, transformer_options: dict):
    """Return the rotary embedding that all items of a batch share, or None.

    The model gives every item the same places; patches may give others.
    """
    if not torch.is_tensor(freqs) or freqs.shape[0] == 1:
        return freqs
    places = transformer_options.get("patches", {}).get("post_input")
    blocks = transformer_options.get("patches_replace", {}).get("dit")
    return None if places or blocks else freqs[:1]


class QwenBlock(Layer):
    """A block; modulated norms join the quantization, gates and residuals the products."""

    @classmethod
    def fits(cls, plain) -> bool:
        """Return whether its norms have no weights and its GELUs are the tanh ones."""
        norms, mlps = cls.norms(plain), (plain.img_mlp, plain.txt_mlp)
        if not all(map(is_plain_norm, norms)) or not are_of_known_classes(plain.attn, *mlps):
            return False
        gelus = [m.net[0].approximate for m in (plain.img_mlp, plain.txt_mlp)]
        # `to_out[1]` drops what its probability says.
        dropouts = (plain.attn.to_out[1], plain.img_mlp.net[1], plain.txt_mlp.net[1])
        drops = any(dropout.p for dropout in dropouts)
        return gelus == ["tanh", "tanh"] and not drops

    def norms(self) -> tuple[torch.nn.Module, ...]:
        """Return the norms before attention and before the MLP, the image's and the text's."""
        return self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        temb,
        image_rotary_emb=None,
        timestep_zero_index=None,
        transformer_options={},  # noqa: B006
    ):
        """Return the block of the text [B, T, C] and of the image [B, L, C].

        timestep_zero_index: from which of the image's tokens on the second half of temb holds.
        """
        image, text, layer = hidden_states, encoder_hidden_states, self.attn
        attend, zero = None, timestep_zero_index
        known = encoder_hidden_states_mask is None and (zero is None or 0 < zero < image.shape[1])
        known = known and isinstance(layer, QwenAttention) and not torch.is_grad_enabled()
        if known and are_untouched(layer, layer.to_out[1], *self.norms()):
            attend = layer.attention(image, text, image_rotary_emb, transformer_options)
        if attend is None:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                timestep_zero_index,
                transformer_options,
            )
        host, text = self._fusion, text.contiguous()
        images = [part.contiguous() for part in image.tensor_split([zero] if zero else [], dim=1)]
        # Shift, scale and gate of the attention, then of the MLP.
        mods = [_modulation(m) for m in self.img_mod(temb).chunk(len(images))]
        of_text = _modulation(self.txt_mod(temb.chunk(len(images))[0]))
        out_text, out = attend(
            [
                host.run_after(layer.of_text, Modulated(text, self.txt_norm1, *of_text[:2])),
                *(
                    host.run_after(layer.of_image, Modulated(part, self.img_norm1, *mod[:2]))
                    for part, mod in zip(images, mods, strict=True)
                ),
            ]
        )
        text = host.run(layer.to_add_out, out_text, None, of_text[2], text)
        given = Modulated(text, self.txt_norm2, *of_text[3:5])
        text = run_feed_forward(host, self.txt_mlp, _layers, _between, given, of_text[5])
        outs = out.split([part.shape[1] for part in images], dim=1)
        for i, mod in enumerate(mods):
            part = host.run(layer.to_out[0], outs[i], None, mod[2], images[i])
            given = Modulated(part, self.img_norm2, *mod[3:5])
            images[i] = run_feed_forward(host, self.img_mlp, _layers, _between, given, mod[5])
        return text, images[0] if len(images) == 1 else torch.cat(images, dim=1)


def _modulation(mod: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the six parts of a modulation [B, 6·C], [B, 1, C] each."""
    return mod.unsqueeze(1).chunk(6, dim=-1)


def _layers(mlp: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    return mlp.net[0].proj, mlp.net[2]


def _between(mlp: torch.nn.Module) -> tuple[torch.nn.Module, ...]:
    return mlp.net[0], mlp.net[1]
