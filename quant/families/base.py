"""What a model family says about its layers: which are quantized, and which names they bear."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]

QUANTIZE = "quantize"
EIGHT_BIT = "eight_bit"
KEEP = "keep"

# In a stack of this many blocks or fewer, the first and last blocks are most of the model: the
# rule that keeps them in 8 bits would leave nothing in 4.
SHORT_STACK = 8


@dataclass(frozen=True)
class Decision:
    """What happens to one layer.

    action: "quantize"; "eight_bit", 8 bits where the rest goes to 4 and quantized as the rest
        otherwise; or "keep", left in its own precision.
    reason: a short text for users; "" for "quantize".
    """

    action: str
    reason: str


@dataclass(frozen=True)
class LayerShape:
    """A linear layer of a real model: weight [N, K], and the rows M that it really gets."""

    name: str
    N: int
    K: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers with GELU (tanh) between them: their names, below that of the whole."""

    name: str
    first: str
    second: str


@dataclass(frozen=True)
class Rule:
    """The layers that `pattern` matches (re.search), and why they are treated apart."""

    pattern: re.Pattern[str]
    reason: str


@dataclass(frozen=True)
class Family:
    """The layers of one model family.

    Layers and keys bear the host's names, without the prefix of the file.

    name: id in checkpoints and on the command line; never renamed.
    recognise: shapes by host key -> variant, or None where the file is of another family.
    quantized: matches (re.fullmatch) each layer that may be quantized.
    never: layers that stay as they are; the first rule that matches gives the reason.
    stack: matches "NAME." of the main stacks of transformer blocks, whose keys are "NAME.7.…".
    first_eight_bit, last_eight_bit: blocks at the ends of a stack that stay in 8 bits, if the
        main stack has more than SHORT_STACK blocks.
    always_eight_bit: layers in 8 bits wherever they are.
    min_features: a layer with fewer inputs or outputs is kept.
    renames: (pattern, replacement) pairs applied to each key in turn (re.sub).
    unsupported: key patterns of files that no renaming brings to the host's layout, and the way
        out.
    shapes: the layers of the real models, by model size.
    shape_source: matches the layers from whose stored weight the host reads the model's sizes: a
        format may not pad their rows.
    shared_inputs: layers of a block, by the ends of their names, that read the same tensor one
        after the other, with no write to it in between.
    feed_forwards: of a block.
    refused: names of tensors -> why such a file cannot be quantized, or None.
    fallback: takes what no other family recognises; one family has it.
    """

    name: str
    title: str
    recognise: Callable[[Shapes], str | None]
    quantized: re.Pattern[str]
    stack: re.Pattern[str]
    never: tuple[Rule, ...] = ()
    first_eight_bit: int = 1
    last_eight_bit: int = 1
    always_eight_bit: tuple[Rule, ...] = ()
    min_features: int = 1
    renames: tuple[tuple[re.Pattern[str], str], ...] = ()
    unsupported: tuple[Rule, ...] = ()
    shapes: Mapping[str, tuple[LayerShape, ...]] = field(default_factory=dict)
    shape_source: re.Pattern[str] | None = None
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    feed_forwards: tuple[FeedForward, ...] = ()
    refused: Callable[[Iterable[str]], str | None] | None = None
    fallback: bool = False

    def decide(self, layer: str, shape: tuple[int, ...], blocks: int) -> Decision:
        """What happens to `layer`.

        layer: module name, without prefix and ".weight". shape: of its unpacked weight, [N, K].
        blocks: blocks in the main stack, as `count_blocks` gives them.
        """
        for rule in self.never:
            if rule.pattern.search(layer):
                return Decision(KEEP, rule.reason)
        if not self.quantized.fullmatch(layer):
            return Decision(KEEP, f"not a layer that the {self.name} family quantizes")
        if len(shape) != 2:
            return Decision(KEEP, f"not a linear layer: its weight has {len(shape)} dimensions")
        if min(shape) < self.min_features:
            return Decision(
                KEEP, f"small layer: {shape[0]} x {shape[1]}, below {self.min_features} features"
            )
        for rule in self.always_eight_bit:
            if rule.pattern.search(layer):
                return Decision(EIGHT_BIT, rule.reason)
        return self._by_depth(layer, blocks)

    def _by_depth(self, layer: str, blocks: int) -> Decision:
        """8 bits at the ends of a long main stack, else quantized."""
        place = self._place(layer)
        if place is None or blocks <= SHORT_STACK:
            return Decision(QUANTIZE, "")
        index = place[1]
        if index < self.first_eight_bit:
            return Decision(EIGHT_BIT, f"block {index} is near the input")
        if index >= blocks - self.last_eight_bit:
            return Decision(EIGHT_BIT, f"block {index} is near the output")
        return Decision(QUANTIZE, "")

    def _place(self, key: str) -> tuple[str, int] | None:
        """The main stack and the block number of `key`, or None outside the main stacks."""
        match = self.stack.match(key)
        if match is None:
            return None
        number = key[match.end() :].partition(".")[0]
        return (match.group(), int(number)) if number.isdecimal() else None

    def block_number(self, key: str) -> int | None:
        """The number of the block of a main stack that `key` lies in, or None outside."""
        place = self._place(key)
        return None if place is None else place[1]

    def count_blocks(self, keys: Iterable[str]) -> int:
        """How many blocks the longest main stack has, numbered from 0 without a gap."""
        stacks: dict[str, set[int]] = {}
        for key in keys:
            place = self._place(key)
            if place is not None:
                stacks.setdefault(place[0], set()).add(place[1])
        return max((_run(numbers) for numbers in stacks.values()), default=0)

    def rename(self, keys: Iterable[str]) -> dict[str, str]:
        """The host's key for each of `keys`, which may be of the host's naming or diffusers'.

        Each key is renamed by itself, so a shard, or layer names without ".weight", will do.
        Unknown names are given back as they are.
        """
        return {key: self._rename_one(key) for key in keys}

    def _rename_one(self, key: str) -> str:
        for pattern, replacement in self.renames:
            key = pattern.sub(replacement, key)
        return key


def _run(numbers: set[int]) -> int:
    """The length of 0, 1, 2, … in `numbers`."""
    length = 0
    while length in numbers:
        length += 1
    return length
