"""The names of tensors in LoRA files: what they say of a layer, and of which.

Dialects: kohya and musubi (`lora_unet_blocks_0_ffn_0.lora_down.weight`), PEFT and diffusers
(`transformer.blocks.0.attn1.to_q.lora_A.weight`), the host's own and LightX2V's
(`diffusion_model.blocks.0.ffn.0.lora_down.weight`, `.diff`, `.diff_b`, `blocks.0.diff_m` of a
block's modulation), Wan Fun's (`lora_unet__`), LyCORIS's (`lycoris_blocks_0_ffn_net_0_proj`).
Source: ComfyUI 0.33 comfy/lora.py and comfy/weight_adapter/, diffusers loaders/lora_conversion_
utils.py, WanVideoWrapper nodes_model_loading.py (`diff_m`).
"""

import enum
import re
from collections.abc import Collection, Iterator, Mapping

from ..families import Family


class Kind(enum.Enum):
    """What a tensor is to its layer."""

    DOWN = "down"
    UP = "up"
    ALPHA = "alpha"
    DIFF = "diff"
    BIAS = "bias"


class Refused(Exception):  # noqa: N818  a finding, which the caller turns into an error
    """A tensor of an adapter that is not W + up · down; the text names it."""


KINDS = (
    (Kind.DOWN, r"\.lora_down(?:\.weight)?|\.lora_A(?:\.\w+)?\.weight|\.lora_A"),
    (Kind.DOWN, r"[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight"),
    (Kind.UP, r"\.lora_up(?:\.weight)?|\.lora_B(?:\.\w+)?\.weight|\.lora_B"),
    (Kind.UP, r"[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight"),
    (Kind.ALPHA, r"\.alpha"),
    (Kind.DIFF, r"\.diff|\.w_norm"),
    (Kind.BIAS, r"\.diff_b|\.b_norm"),
)
# What stands for a parameter of the layer before it: LightX2V's.
INNER = {".diff_m": ".modulation.diff"}
ENDS = tuple((kind, re.compile(rf"(.+?)(?:{ends})")) for kind, ends in KINDS)
OTHERS = (
    ("DoRA", r"\.dora_scale|\.lora_magnitude_vector(?:\.\w+)*"),
    ("LoHa", r"\.hada_\w+"),
    ("LoKr", r"\.lokr_\w+"),
    ("OFT", r"\.oft_\w+|\.oft_R(?:\.\w+)*"),
    ("GLoRA", r"\.[ab][12]\.weight"),
    ("LoCon with a middle matrix", r"\.lora_mid\.weight"),
    ("LoRA with a bias of its own", r"\.lora_B(?:\.\w+)?\.bias"),
    ("LoRA that changes the shape of a layer", r"\.reshape_weight"),
    ("LoRA that replaces weights", r"\.set_weight"),
)
REFUSED = tuple((what, re.compile(rf".+(?:{ends})")) for what, ends in OTHERS)
# Beside a tensor that somebody has quantized, or scaled to the range of FP8.
SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale\w*|(?:weight\.)?scale(?:_inv)?)")
# Before names with dots, any number of them one after the other.
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.", "unet.", "pipe.dit.")
# Before names whose dots are underscores; the longest first.
FLAT = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")


def split(name: str) -> tuple[str, Kind | None]:
    """Return (the layer's name in the file, what the tensor is to it; None: nothing known).

    Raises Refused for tensors of other adapters.
    """
    for what, pattern in REFUSED:
        if pattern.fullmatch(name):
            raise Refused(what)
    for short, full in INNER.items():
        if name.endswith(short):
            name = name.removesuffix(short) + full
    for kind, pattern in ENDS:
        if found := pattern.fullmatch(name):
            return found[1], kind
    return name, None


def scaled_by(name: str) -> tuple[str, ...]:
    """Return the names that the tensor may have which `name` is a scale of; none if it is none."""
    found = SCALE.fullmatch(name)
    return (found[1], f"{found[1]}.weight") if found else ()


class Names:
    """The names of a model's layers and parameters, in every dialect."""

    def __init__(
        self,
        places: Collection[str],
        family: Family,
        aliases: Mapping[str, str],
        parts: Mapping[str, str],
    ):
        self.places = set(places)
        self.family = family
        self.aliases = aliases
        self.parts = parts
        self.flat = {place.replace(".", "_"): place for place in places}
        self.flat_renames = [_flattened(*rename) for rename in family.renames]

    def resolve(self, name: str) -> str | None:
        """Return the place that a file calls `name`, or None."""
        for prefix in FLAT:
            if name.startswith(prefix) and (place := self._of_flat(name.removeprefix(prefix))):
                return place
        for bare in _stripped(name):
            place = self.family.rename([bare])[bare]
            if place in self.places:
                return place
        place = self.aliases.get(name)
        return place if place in self.places else None

    def _of_flat(self, name: str) -> str | None:
        """Return the place of a name whose dots are underscores, the host's or diffusers'."""
        name = name.replace(".", "_")
        if name not in self.flat:
            for pattern, replacement in self.flat_renames:
                name = pattern.sub(replacement, name)
        return self.flat.get(name)

    def part_of(self, name: str) -> str | None:
        """Return the layer into which the model has fused what a file calls `name`, or None."""
        return next((self.parts[bare] for bare in _stripped(name) if bare in self.parts), None)


def _flattened(pattern: re.Pattern[str], replacement: str) -> tuple[re.Pattern[str], str]:
    """Return a family's rename for names whose dots are underscores."""
    return re.compile(pattern.pattern.replace(r"\.", "_")), replacement.replace(".", "_")


def _stripped(name: str) -> Iterator[str]:
    """Yield a name, and what is left of it without its prefixes."""
    yield name
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
        yield name
