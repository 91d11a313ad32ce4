"""One line of the demo's result, and how its table shows it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MEGA = 1_000_000
# The backend that multiplies by the dequantized weight and leaves the layer's input as it is.
WEIGHT_ONLY_BACKEND = "reference"


@dataclass(frozen=True)
class Row:
    """One model in one format. For the source itself the fields that may be None are.

    path: of the checkpoint. layers: quantized. bits: stored per weight of these layers, scales
    included. weight_error: relative L2 error of a weight, mean over these layers. output_error:
    relative L2 difference of the final latents from the source's. backend: of `ops.linear`.
    """

    model: str
    format: str
    path: str
    layers: int
    size_bytes: int
    bits: float
    seconds_per_step: float
    weight_error: float | None = None
    output_error: float | None = None
    quantize_seconds: float | None = None
    backend: str | None = None

    @property
    def rounds_input(self) -> bool:
        """Whether the inputs of the layers were quantized too when the model ran."""
        return self.backend not in (None, WEIGHT_ONLY_BACKEND)


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, and the text of its cell in a row."""

    title: str
    text: Callable[[Row], str]
    numeric: bool = True


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


COLUMNS = (
    Column("model", lambda row: row.model, numeric=False),
    Column("format", lambda row: row.format, numeric=False),
    Column("layers", lambda row: str(row.layers)),
    Column("file MB", lambda row: _number(row.size_bytes / MEGA, 2)),
    Column("bits/weight", lambda row: _number(row.bits, 2)),
    Column("weight error", lambda row: _number(row.weight_error, 4)),
    Column("output error", lambda row: _number(row.output_error, 4)),
    Column("quantize s", lambda row: _number(row.quantize_seconds, 2)),
    Column("step s", lambda row: _number(row.seconds_per_step, 3)),
    Column("ran as", lambda row: row.backend or "plain", numeric=False),
)

NOTES = (
    "Weight error: relative L2 error of a quantized weight, mean over layers. Output error: "
    "relative L2 difference of the final latents from those of the bf16 weights, with the same "
    "noise and prompts.",
    "Ran as: reference rounds the weights only and multiplies in float32; kitchen rounds the "
    "layers' inputs too; plain is torch, in float32.",
    "The seconds are those of one CPU thread and say nothing about a GPU: a CPU emulates these "
    "formats, so that every one of them is slower here than no format at all.",
    "The models are small and their weights are random, scaled as trained ones are: a trained "
    "model has other errors.",
)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table as text: the titles, then a line for each row."""
    titles = [column.title for column in COLUMNS]
    return [titles, *([column.text(row) for column in COLUMNS] for row in rows)]
