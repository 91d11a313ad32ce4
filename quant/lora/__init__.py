"""LoRA files: which tensors belong to which layer of a model, in every dialect.

Knows names and tensors alone; the arithmetic is `ops/linear/low_rank.py`, what a host makes of it
lies beside that host's nodes.
"""

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ..checkpoint import Checkpoint, CheckpointError
from ..checkpoint.header import parse_json
from ..families import Family
from .names import PREFIXES, Kind, Names, Refused, scaled_by, split

__all__ = ["Layer", "LoraError", "Parsed", "fitting", "parse", "read", "read_finite"]

logger = logging.getLogger(__name__)

ADAPTER_METADATA = "lora_adapter_metadata"
SHOWN = 3
FLOAT_MAX = torch.finfo(torch.float32).max


class LoraError(ValueError):
    """A LoRA file that cannot be used: what it holds, and what to do instead."""


@dataclass(frozen=True)
class Parsed:
    """What a file holds, tensors by name.

    pairs: layer -> (down, up). alphas: layer -> name. diffs: layer, or parameter without `.weight`
    -> difference of its weight. biases: layer -> difference of its bias. unknown: names that fit no
    layer of the model. alpha: of the layers that have none, or None.
    """

    pairs: dict[str, tuple[str, str]]
    alphas: dict[str, str]
    diffs: dict[str, str]
    biases: dict[str, str]
    unknown: tuple[str, ...]
    alpha: float | None


@dataclass(frozen=True)
class Layer:
    """The LoRA of one layer: W + scale · up · down, and bias added to the layer's own.

    down: [R, K] of a linear layer, [R, C, *kernel] of a convolution. up: [N, R]. scale: alpha / R.
    bias: [N] or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    bias: torch.Tensor | None


def parse(
    checkpoint: Checkpoint,
    places: Collection[str],
    family: Family,
    aliases: Mapping[str, str] | None = None,
    parts: Mapping[str, str] | None = None,
) -> Parsed:
    """Return which tensors of a LoRA file belong to which layer.

    places: the model's layers and bare parameters (`blocks.0.modulation`), by the host's names.
    family: knows other names for them. aliases: more names, as files have them -> places.
    parts: names of what the model has fused or reordered in one layer -> that layer.
    Raises LoraError for kinds that are no sum (DoRA, LoHa, LoKr, …), for parts of fused layers, for
    halves of a pair, for two tensors in one place, for tensors that have scales, and where nothing
    fits the model.
    """
    names = Names(places, family, aliases or {}, parts or {})
    found: dict[Kind, dict[str, str]] = {kind: {} for kind in Kind}
    unknown = []
    for name in checkpoint:
        try:
            base, kind = split(name)
        except Refused as reason:
            raise LoraError(
                f"{checkpoint.path}: {name} makes it a {reason}, which is no sum beside the "
                "weight; use ComfyUI's own LoRA loader, which merges it"
            ) from None
        place = names.resolve(base) if kind else None
        if place is None and kind and (fused := names.part_of(base)):
            raise LoraError(
                f"{checkpoint.path}: {name} is of what this model holds in {fused}, fused or with "
                "its rows in another order; use ComfyUI's own LoRA loader, which merges it"
            )
        if place is None:
            unknown.append(name)
        elif place in found[kind]:
            raise LoraError(f"{checkpoint.path}: {found[kind][place]} and {name} are of one layer")
        else:
            found[kind][place] = name
    down, up = found[Kind.DOWN], found[Kind.UP]
    if half := sorted(down.keys() ^ up.keys()):
        raise LoraError(f"{checkpoint.path}: {half[0]} has one matrix of the two of a LoRA")
    pairs = {place: (name, up[place]) for place, name in down.items()}
    diffs, biases = found[Kind.DIFF], found[Kind.BIAS]
    used = {*down.values(), *up.values(), *diffs.values(), *biases.values()}
    _refuse_scales(checkpoint, unknown, used)
    if not (pairs or diffs or biases):
        shown = ", ".join((unknown or list(checkpoint))[:SHOWN])
        raise LoraError(f"{checkpoint.path}: nothing in it fits this model; it holds {shown}, …")
    alpha = _adapter_alpha(checkpoint)
    return Parsed(pairs, found[Kind.ALPHA], diffs, biases, tuple(unknown), alpha)


def _refuse_scales(checkpoint: Checkpoint, unknown: list[str], used: set[str]) -> None:
    """Raise LoraError where a tensor of the file is a scale of one that is used."""
    for name in unknown:
        for matrix in used.intersection(scaled_by(name)):
            raise LoraError(
                f"{checkpoint.path}: {name} is a scale of {matrix}; a LoRA is read without "
                "scales alone: fetch it in 16 bits"
            )


def _adapter_alpha(checkpoint: Checkpoint) -> float | None:
    """Return the alpha of all layers that diffusers wrote into the file's header, or None.

    Settings of the model count (`transformer.lora_alpha`), those of text encoders do not.
    Raises LoraError for settings that give layers alphas of their own, and for what is no settings.
    """
    text = checkpoint.metadata.get(ADAPTER_METADATA, "{}")
    try:
        settings = parse_json(text, f"{checkpoint.path}: {ADAPTER_METADATA}")
    except CheckpointError as error:
        raise LoraError(str(error)) from error
    if not isinstance(settings, dict):
        raise LoraError(f"{checkpoint.path}: {ADAPTER_METADATA} is no object but {settings!r:.40}")
    found = _values(settings, "alpha_pattern") | _values(settings, "use_rslora")
    odd = [key for key, value in found.items() if value]
    if odd:
        raise LoraError(f"{checkpoint.path}: {odd[0]} in its {ADAPTER_METADATA} is not supported")
    alphas = _values(settings, "lora_alpha")
    if not all(type(a) in (int, float) and abs(a) <= FLOAT_MAX for a in alphas.values()):
        raise LoraError(
            f"{checkpoint.path}: {ADAPTER_METADATA} has {alphas!r:.80}, a number is wanted"
        )
    if len(set(alphas.values())) > 1:
        raise LoraError(f"{checkpoint.path}: {ADAPTER_METADATA} has several alphas, {alphas}")
    return float(next(iter(alphas.values()))) if alphas else None


def _values(settings: Mapping[str, object], name: str) -> dict[str, object]:
    """Return the settings of the model itself that are called `name`, by key."""
    keys = (f"{prefix}{name}" for prefix in ("", *PREFIXES))
    return {key: settings[key] for key in keys if settings.get(key) is not None}


def fitting(
    checkpoint: Checkpoint, parsed: Parsed, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Parsed, tuple[str, ...]]:
    """Return (what of `parsed` has the shapes of the model, the parameters that the rest is of).

    shapes: of the model's parameters, by name. A file for another variant of a model, such as one
    of text to video for one of image to video, may differ from it in a few layers. Pairs of rank 0
    that fit, whose sum is zero, are in neither, and logged.
    Raises LoraError where nothing fits, for rank 0 that does not, for rank 0 alone, and for what
    fits but is not of floats.
    """

    def weight(place: str) -> str:
        return place if place in shapes else f"{place}.weight"

    def is_pair(place: str, names: tuple[str, str]) -> bool:
        return _is_pair(*(checkpoint[name].shape for name in names), shapes[weight(place)])

    def is_difference(parameter: str, name: str) -> bool:
        return tuple(checkpoint[name].shape) == shapes.get(parameter)

    ranks = {place: _ranks(checkpoint, names) for place, names in parsed.pairs.items()}
    ranked = {place: names for place, names in parsed.pairs.items() if 0 not in ranks[place]}
    pairs = {place: names for place, names in ranked.items() if is_pair(place, names)}
    diffs = {p: name for p, name in parsed.diffs.items() if is_difference(weight(p), name)}
    biases = {p: name for p, name in parsed.biases.items() if is_difference(f"{p}.bias", name)}
    left = [weight(place) for place in ranked if place not in pairs]
    left += [weight(place) for place in parsed.diffs if place not in diffs]
    left += [f"{place}.bias" for place in parsed.biases if place not in biases]
    if left and not (pairs or diffs or biases):
        raise LoraError(
            f"{checkpoint.path}: of another model: nothing in it has this one's shapes; "
            f"{left[0]} is {list(shapes.get(left[0], ()))} here"
        )
    empty = {place: names for place, names in parsed.pairs.items() if place not in ranked}
    for place, names in empty.items():
        if ranks[place] != (0, 0) or not is_pair(place, names):
            down, up = (f"{name} {list(checkpoint[name].shape)}" for name in names)
            raise LoraError(
                f"{checkpoint.path}: malformed: {down} and {up}, of rank 0, are no pair for "
                f"{weight(place)} {list(shapes[weight(place)])}; fetch the file again"
            )
    if empty:
        _leave_out(checkpoint, [down for down, _ in empty.values()], bool(pairs or diffs or biases))
    matrices = (name for names in pairs.values() for name in names)
    _refuse_integers(checkpoint, (*matrices, *diffs.values(), *biases.values()))
    return replace(parsed, pairs=pairs, diffs=diffs, biases=biases), tuple(left)


def _refuse_integers(checkpoint: Checkpoint, names: Collection[str]) -> None:
    for name in names:
        dtype = checkpoint[name].dtype
        if not dtype.is_floating_point:
            raise LoraError(
                f"{checkpoint.path}: {name} is of {dtype}; a LoRA is read of floats alone: "
                "fetch it in 16 bits"
            )


def _ranks(checkpoint: Checkpoint, names: tuple[str, str]) -> tuple[int | None, int | None]:
    """Return the ranks of a pair by down [R, …] and by up [N, R, …]; None without the dimension."""
    down, up = (checkpoint[name].shape for name in names)
    return (down[0] if down else None, up[1] if len(up) > 1 else None)


def _is_pair(down: tuple[int, ...], up: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether the product of two matrices has the shape of a weight."""
    if not (down and up and shape):
        return False
    same = math.prod(down[1:]) == math.prod(shape[1:])
    return same and up[0] == shape[0] and math.prod(up) == shape[0] * down[0]


def _leave_out(checkpoint: Checkpoint, empty: list[str], has_more: bool) -> None:
    """Log the pairs of rank 0, by their first matrix; LoraError if the file has nothing more."""
    if not has_more:
        raise LoraError(
            f"{checkpoint.path}: {empty[0]} is of rank 0, and nothing else in it changes this "
            "model; fetch the file again"
        )
    left = f"{empty[0]} and {len(empty) - 1} more" if len(empty) > 1 else empty[0]
    logger.info("LowBit: %s: of rank 0, which adds nothing, left out: %s", checkpoint.path, left)


def read(
    checkpoint: Checkpoint, parsed: Parsed, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Layer]]:
    """Yield (layer, its LoRA) of every pair, biases with them.

    parsed: as `fitting` returned it. shapes: of the model's parameters, by name.
    Raises LoraError for an alpha that is not one finite number, and for tensors with NaN or Inf.
    """
    for place, (down_name, up_name) in parsed.pairs.items():
        down, up = read_finite(checkpoint, down_name), read_finite(checkpoint, up_name)
        rank, (n, *inputs) = down.shape[0], shapes[f"{place}.weight"]
        alpha = parsed.alpha
        if place in parsed.alphas:
            alpha = _alpha(checkpoint, parsed.alphas[place])
        bias = parsed.biases.get(place)
        yield (
            place,
            Layer(
                down.reshape(rank, *inputs),
                up.reshape(n, rank),
                1.0 if alpha is None else alpha / rank,
                None if bias is None else read_finite(checkpoint, bias),
            ),
        )


def read_finite(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return a tensor of floats. Raises LoraError where it holds NaN or Inf, in float32."""
    value = checkpoint.read(name)
    # NaN is both of them where there is one. Asking each number takes several times as long.
    ends = torch.aminmax(value.float()) if value.numel() else ()
    if not all(map(math.isfinite, ends)):
        raise LoraError(f"{checkpoint.path}: {name} holds NaN or Inf; fetch the file again")
    return value


def _alpha(checkpoint: Checkpoint, name: str) -> float:
    value = checkpoint.read(name)
    if value.numel() != 1 or not torch.isfinite(alpha := value.float()).all():
        raise LoraError(
            f"{checkpoint.path}: {name} is {value.flatten()[:SHOWN].tolist()}, of shape "
            f"{list(value.shape)}; an alpha is one finite number"
        )
    return alpha.item()
