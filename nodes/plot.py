"""A plot of a model's layers as an IMAGE, drawn with Pillow, which the host brings."""

import math
from collections.abc import Sequence

import torch

from ..quant.record import LayerRecord
from ..quant.report import MIB

WIDTH, HEIGHT = 1200, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 70, 50, 40
FONT_SIZE = 15
BACKGROUND, AXIS, BAR, KEPT, DOT = "white", "#444444", "#9ecae1", "#d9d9d9", "#d62728"


def layers(records: Sequence[LayerRecord]) -> torch.Tensor:
    """Return the plot [1, H, W, 3], float in 0..1: bars are sizes, dots are errors (log scale)."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(FONT_SIZE)
    _frame(draw, records)
    step = (WIDTH - LEFT - RIGHT) / max(len(records), 1)
    largest = max((r.size_bytes for r in records), default=1)
    for index, record in enumerate(records):
        x = LEFT + index * step
        top = _y(record.size_bytes / largest)
        color = BAR if record.format else KEPT
        draw.rectangle((x, top, x + max(step - 1, 1), HEIGHT - BOTTOM), fill=color)
    for index, record in enumerate(records):
        if record.error:
            x, y = LEFT + (index + 0.5) * step, _y(_log_place(record.error, records))
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=DOT)
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.reshape(1, HEIGHT, WIDTH, 3).float() / 255


def _y(place: float) -> float:
    return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)


def _decades(records: Sequence[LayerRecord]) -> tuple[int, int]:
    errors = [r.error for r in records if r.error]
    if not errors:
        return -3, 0
    return math.floor(math.log10(min(errors))), max(math.ceil(math.log10(max(errors))), 0)


def _log_place(error: float, records: Sequence[LayerRecord]) -> float:
    low, high = _decades(records)
    return (math.log10(error) - low) / (high - low)


def _frame(draw, records: Sequence[LayerRecord]) -> None:
    quantized = sum(1 for r in records if r.format)
    size = sum(r.size_bytes for r in records) / MIB
    draw.text(
        (LEFT, 15),
        f"{len(records)} linear layers, {quantized} quantized, {size:.1f} MiB. Bars: MiB of a "
        "layer (grey: kept). Dots: relative error of its weight, log scale.",
        fill=AXIS,
    )
    draw.line((LEFT, TOP, LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM), fill=AXIS)
    draw.line((WIDTH - RIGHT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), fill=AXIS)
    largest = max((r.size_bytes for r in records), default=1) / MIB
    for part in (0, 0.5, 1):
        draw.text((8, _y(part) - 6), f"{largest * part:.2f}", fill=AXIS)
    low, high = _decades(records)
    for exponent in range(low, high + 1):
        y = _y((exponent - low) / (high - low))
        draw.text((WIDTH - RIGHT + 8, y - 6), f"1e{exponent}", fill=DOT)
    draw.text((LEFT, HEIGHT - BOTTOM + 12), "layers in the order of the model", fill=AXIS)
