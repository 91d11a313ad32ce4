"""What the fused layers have in common: what they ask of the host, and a modulated norm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...ops.quantize_rows import Prologue
from ...quant import fusion


@dataclass(frozen=True)
class Host:
    """What the host does for its layers, wherever their weights are.

    norm_weight: (norm, like) -> its weight on the device of `like`, to be kept.
    cast: (parameter, like) -> it in the dtype and on the device of `like`.
    run: (linear, x, act, gate, residual) -> residual + gate · linear(act(x)); act: "gelu_tanh" or
    None; gate [B, T, N], one for L / T tokens each, and residual [B, L, N], or neither.
    run_after: (linears, `Modulated`) -> each layer's result for the input that it describes.
    """

    norm_weight: Callable
    cast: Callable
    run: Callable
    run_after: Callable


class Layer(fusion.Fused):
    """Mixed into the class of a layer of the host."""

    _fusion: Host

    @classmethod
    def fits(cls, plain: torch.nn.Module) -> bool:
        """Return whether a layer of the host computes what the copy would."""
        raise NotImplementedError


@dataclass(frozen=True)
class Modulated:
    """norm(x) · (1 + scale) + shift, not computed yet.

    x: [B, L, C], contiguous. norm: a LayerNorm without weight. shift, scale: [B, T, C], each for
    L / T tokens.
    """

    x: torch.Tensor
    norm: torch.nn.Module
    shift: torch.Tensor
    scale: torch.Tensor

    @property
    def steps(self) -> Prologue:
        """Return it as what comes before the quantization of x."""
        shift, scale = self.shift.flatten(0, 1), self.scale.flatten(0, 1)
        return Prologue("layer", self.norm.eps, scale=scale, shift=shift)

    def plain(self) -> torch.Tensor:
        """Return it as the host computes it."""
        tokens = self.x.shape[1]
        shift, scale = per_token(self.shift, tokens), per_token(self.scale, tokens)
        return torch.addcmul(shift, self.norm(self.x), 1 + scale)


def per_token(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return rows [B, T, C] for all tokens, [B, tokens, C] or, where T is 1, [B, 1, C]."""
    each = tokens // rows.shape[1]
    return rows if rows.shape[1] == 1 or each == 1 else rows.repeat_interleave(each, dim=1)


def gated(residual: torch.Tensor, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return residual + gate · out, as the host computes it; gate: [B, T, C]."""
    return torch.addcmul(residual, out, per_token(gate, out.shape[1]))


def is_plain_norm(norm: torch.nn.Module) -> bool:
    """Return whether a norm is a LayerNorm over the last dimension, without weight and bias."""
    if not isinstance(norm, torch.nn.LayerNorm) or len(norm.normalized_shape) != 1:
        return False
    return norm.weight is None and norm.bias is None


def have_one_eps(norms: Sequence[torch.nn.Module]) -> bool:
    """Return whether norms are RMS norms with a weight each and one eps for all."""
    alike = all(isinstance(n, torch.nn.RMSNorm) and n.weight is not None for n in norms)
    return alike and norms[0].eps is not None and len({norm.eps for norm in norms}) == 1


def are_untouched(*modules: torch.nn.Module) -> bool:
    """Return whether layers do what their classes do, and these are the host's, torch's or ours."""
    return all(_is_untouched(module) for module in modules)


def are_of_known_classes(*modules: torch.nn.Module) -> bool:
    """Return whether the classes of layers are the host's, torch's or ours."""
    known = (isinstance(m, fusion.Fused) or _is_from(type(m).__module__) for m in modules)
    return all(known)


def _is_from(package: str) -> bool:
    return package.startswith(("comfy.", "torch.nn."))


def _is_untouched(module: torch.nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks
    return are_of_known_classes(module) and not hooks and fusion.has_own_forward(module)


def run_feed_forward(
    host: Host,
    whole: torch.nn.Module,
    layers: Callable[[torch.nn.Module], Sequence[torch.nn.Module]],
    between: Callable[[torch.nn.Module], Sequence[torch.nn.Module]],
    given: Modulated,
    gate: torch.Tensor,
) -> torch.Tensor:
    """Return x + gate · second(gelu(first(norm(x) modulated))).

    whole: the feed-forward; layers: gives its first and second layer. between: gives the others
    that the host calls.
    """
    if not are_untouched(whole, given.norm) or not are_untouched(*between(whole)):
        return gated(given.x, whole(given.plain()), gate)
    first, second = layers(whole)
    (h,) = host.run_after((first,), given)
    return host.run(second, h, "gelu_tanh", gate, given.x)
