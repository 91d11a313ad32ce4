"""Which layer of a model goes to which format: a format, a family's rules and the user's wishes."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from . import families, formats
from .families.base import EIGHT_BIT, KEEP
from .formats import Format

AUTO = "auto"
NONE = "none"

# What takes the layers that stay in 8 bits beside a 4-bit format, the first that fits: the most
# exact 8-bit format comes first.
EIGHT_BIT_FORMATS = ("int8_convrot", "fp8_e4m3")
EIGHT_BITS = 8


@dataclass(frozen=True)
class Choice:
    """What happens to a layer: its format, or None with the reason why it keeps its precision."""

    format: Format | None
    reason: str = ""


def nothing_to_quantize(format_name: str, recipe_name: str, choices: Iterable[Choice]) -> str:
    """Return in words that no layer would be quantized, and why most are not."""
    reasons = Counter(choice.reason for choice in choices)
    text = f"nothing to quantize to {format_name} under recipe {recipe_name}"
    if not reasons:
        return f"{text}: there is no linear layer"
    reason, count = reasons.most_common(1)[0]
    text += f": {count} of {reasons.total()} layers stay, {reason}"
    return text if recipe_name == NONE else f"{text}; recipe none takes every layer that fits"


@dataclass(frozen=True)
class Recipe:
    """The rules for one model. family: None for recipe `none`, which spares only what `keep` names.

    blocks: transformer blocks in the main stack. keep: patterns searched in a layer's name.
    """

    name: str
    format: Format
    family: families.Family | None
    blocks: int
    keep: tuple[re.Pattern[str], ...] = ()

    def choose(self, layer: str, shape: tuple[int, ...]) -> Choice:
        """Return what happens to `layer` (host's name, no prefix) with weight `shape` [N, K]."""
        for pattern in self.keep:
            if pattern.search(layer):
                return Choice(None, f"kept as asked: {pattern.pattern}")
        fmt = self.format
        if self.family:
            decision = self.family.decide(layer, shape, self.blocks)
            if decision.action == KEEP:
                return Choice(None, decision.reason)
            source = self.family.shape_source
            if source and source.fullmatch(layer) and shape[0] % fmt.pad_multiple:
                reason = f"{fmt.name} would pad it, and ComfyUI reads the model's width from it"
                return Choice(None, reason)
            if decision.action == EIGHT_BIT and fmt.bits < EIGHT_BITS:
                return self._eight_bit(shape, decision.reason)
        unfit = fmt.unfit(shape)
        return Choice(None, unfit) if unfit else Choice(fmt)

    def requantize(self, shape: tuple[int, ...], reason: str) -> Choice:
        """Return the format for a layer that has to take one, another of 8 bits if it must."""
        if self.format.unfit(shape):
            return self._eight_bit(shape, reason)
        return Choice(self.format, reason)

    def _eight_bit(self, shape: tuple[int, ...], reason: str) -> Choice:
        for name in EIGHT_BIT_FORMATS:
            fmt = formats.get(name)
            if not fmt.unfit(shape):
                return Choice(fmt, f"8 bits: {reason}")
        return Choice(None, reason)


def names() -> tuple[str, ...]:
    """Return the names of recipes: `auto`, the families', `none`."""
    return (AUTO, *families.names(), NONE)


def build(format_name: str, recipe: str, keep: Iterable[str], model: families.Recognised) -> Recipe:
    """Return the recipe for a recognised model.

    recipe: `auto` for the model's own family, a family's name, or `none`. keep: regular
    expressions. Raises ValueError for an unknown name or a malformed expression.
    """
    if recipe not in names():
        raise ValueError(f"unknown recipe {recipe!r}; known are {', '.join(names())}")
    family = model.family if recipe == AUTO else None if recipe == NONE else families.get(recipe)
    try:
        patterns = tuple(re.compile(pattern) for pattern in keep)
    except re.error as error:
        raise ValueError(f"keep: {error.pattern!r} is no regular expression: {error}") from error
    blocks = model.blocks if family is model.family else _count_blocks(family, model)
    return Recipe(recipe, formats.get(format_name), family, blocks, patterns)


def _count_blocks(family: families.Family | None, model: families.Recognised) -> int:
    return family.count_blocks(model.renamed.values()) if family else 0
