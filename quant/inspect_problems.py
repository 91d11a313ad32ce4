"""The problems that `inspect_file` knows: a stable code, how bad it is, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass

HOST = "ComfyUI"
PACK = "LowBit"
BOTH = (HOST, PACK)
NOBODY = ()

ERROR = "error"
WARNING = "warning"


@dataclass(frozen=True)
class Kind:
    """A kind of problem. affects: who loads such a file wrongly or not at all; nobody: a warning.

    meaning: what happens. advice: what to do.
    """

    code: str
    affects: tuple[str, ...]
    meaning: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """One problem of one layer. affects: None for what the kind says. layer: "" for the file."""

    code: str
    layer: str
    detail: str
    affects: tuple[str, ...] | None = None

    @property
    def who(self) -> tuple[str, ...]:
        return KINDS[self.code].affects if self.affects is None else self.affects


@dataclass(frozen=True)
class Problem:
    """A kind of problem and all layers that have it. detail: of the first layer."""

    code: str
    severity: str
    affects: tuple[str, ...]
    layers: tuple[str, ...]
    detail: str
    meaning: str
    advice: str


def group(findings: Iterable[Finding]) -> tuple[Problem, ...]:
    """Return findings of one kind, and with one set of affected, as one problem; errors first."""
    grouped: dict[tuple[str, tuple[str, ...]], list[Finding]] = {}
    for finding in findings:
        grouped.setdefault((finding.code, finding.who), []).append(finding)
    problems = [_problem(KINDS[code], who, found) for (code, who), found in grouped.items()]
    return tuple(sorted(problems, key=lambda p: p.severity != ERROR))


def _problem(kind: Kind, affects: tuple[str, ...], found: list[Finding]) -> Problem:
    severity = ERROR if affects else WARNING
    layers = tuple(f.layer for f in found if f.layer)
    return Problem(kind.code, severity, affects, layers, found[0].detail, kind.meaning, kind.advice)


AGAIN = "Quantize the 16-bit file again with `lowbit quantize`."
CONVERT = "`lowbit convert` writes it as ComfyUI has it, where LowBit reads it. Else: "

_KINDS = (
    Kind(
        "fp8_unscaled",
        NOBODY,
        "FP8 without a scale loads as it is, and is less exact than FP8 with one.",
        "Nothing has to be done; quantizing the 16-bit file gives a smaller error.",
    ),
    Kind(
        "scale_ignored",
        (HOST,),
        "The weights are read without their scale: noise, or a black picture.",
        "Rewrite the file with `lowbit quantize --format fp8_e4m3`, which marks every layer, if "
        "LowBit reads the scale; else quantize the 16-bit file again.",
    ),
    Kind(
        "scale_missing",
        BOTH,
        "A marked layer cannot be dequantized without its scales.",
        "The file is incomplete: download it again, or quantize the 16-bit file.",
    ),
    Kind(
        "scale_shape",
        BOTH,
        "The scales do not fit the weight: a failure when it runs, or noise.",
        CONVERT + AGAIN,
    ),
    Kind(
        "scale_kind",
        BOTH,
        "NVFP4's block scales and those of MX formats do not mix: every block is multiplied by a "
        "wrong number, or the file is refused.",
        "Correct the marking if the tensors are whole. " + AGAIN,
    ),
    Kind(
        "scale_not_finite",
        BOTH,
        "One such scale makes the picture black.",
        "The file or its source is damaged: download it again. " + AGAIN,
    ),
    Kind(
        "scale_order",
        BOTH,
        "Every block is multiplied by the scale of another one: noise that looks like weights.",
        "`lowbit convert` with --scales, and --from for the order of nibbles, puts them right. "
        "Else: " + AGAIN,
    ),
    Kind(
        "scale_order_doubtful",
        NOBODY,
        "Tiles, a diagonal or blocks in a weight make its scales look so too. All are read as they "
        "are marked: more layers of their format speak for that, or only one speaks against it, or "
        "LowBit wrote the file in an order it was told.",
        "Nothing has to be done unless pictures are noise; then `lowbit convert` with --scales "
        "flat or twice reads them in that order.",
    ),
    Kind(
        "per_channel_as_tensor",
        BOTH,
        "One scale per output channel is read as one per tensor: a good-looking picture of "
        "something else, or a failure.",
        "`lowbit convert` marks the layers float8_e4m3fn_rowwise, which LowBit loads; `lowbit "
        "quantize --format int8_convrot` makes of it what ComfyUI loads too.",
    ),
    Kind(
        "payload_dtype",
        BOTH,
        "The stored numbers are not named as those of the marked format: ComfyUI converts their "
        "values, which makes noise of plain bytes. LowBit refuses what is not plain bytes.",
        CONVERT + AGAIN,
    ),
    Kind(
        "payload_shape",
        BOTH,
        "A quantized weight that is no matrix is refused.",
        AGAIN,
    ),
    Kind(
        "unknown_format",
        BOTH,
        "A loader that does not know the format refuses the file.",
        "Where only ComfyUI is affected, load it with LowBit's loader, or let `lowbit convert` "
        "write what ComfyUI loads where a format of it has the same numbers. Else quantize the "
        "16-bit file again.",
    ),
    Kind(
        "unmarked_integers",
        BOTH,
        "Integers without a marking are taken for the weights themselves, or refused.",
        CONVERT + AGAIN,
    ),
    Kind(
        "marker_unreadable",
        BOTH,
        "The marking is damaged, so the layer's format is not known.",
        "Download the file again. " + AGAIN,
    ),
    Kind(
        "marker_without_weight",
        BOTH,
        "The file is incomplete.",
        "Download it again, or give all of its shards.",
    ),
    Kind(
        "metadata_unknown_layer",
        (PACK,),
        "LowBit refuses the file, as its real layers may go unmarked; ComfyUI ignores the name.",
        "Correct the names in the metadata, prefix included, or quantize the 16-bit file again.",
    ),
    Kind(
        "nibble_order_unknown",
        NOBODY,
        "ModelOpt stores the even column in the low nibble, ComfyUI reads it from the high one; "
        "the numbers do not show which it is.",
        "If pictures are noise, the nibbles were not swapped: quantize the 16-bit file instead.",
    ),
    Kind(
        "diffusers_names",
        (HOST,),
        "ComfyUI does not know diffusers' names of this family and refuses the file.",
        "`lowbit quantize` reads them and writes ComfyUI's.",
    ),
    Kind(
        "unknown_prefix",
        (HOST,),
        "ComfyUI does not look for a model under this prefix.",
        "`lowbit quantize` writes the names without it.",
    ),
    Kind(
        "fused_layers",
        BOTH,
        "ComfyUI fuses layers of diffusers-named files while it loads them; quantized layers lose "
        "their scales.",
        "Quantize a file in ComfyUI's own names, or the loaded model.",
    ),
    Kind(
        "incomplete",
        BOTH,
        "The model runs into missing weights.",
        "Download it again, or give the folder with all shards and their index. Where weights have "
        "other names another program packed them: quantize the 16-bit file with `lowbit quantize`.",
    ),
    Kind(
        "unsupported_layout",
        BOTH,
        "No renaming brings this file to ComfyUI's layout.",
        "Take the file in the original or in ComfyUI's layout.",
    ),
    Kind(
        "foreign_layout",
        (HOST,),
        "Another program's names, order of nibbles, or order of scales: noise, or refused.",
        "LowBit loads it, and `lowbit convert` writes it as ComfyUI has it, bit for bit where one "
        "of its formats has the same numbers.",
    ),
    Kind(
        "ambiguous_layout",
        (PACK,),
        "Several programs write such tensors, in different orders, and the file does not show "
        "which it was. LowBit refuses it rather than guess.",
        "Say it with `lowbit convert` and the options that the detail names.",
    ),
    Kind(
        "refused",
        (PACK,),
        "LowBit refuses the file.",
        "See the detail.",
    ),
)

KINDS = {kind.code: kind for kind in _KINDS}
