"""The demo's plot: output error against bits per weight, a panel for each model."""

import math
from collections.abc import Sequence
from itertools import pairwise

from .row import Row

TITLE = "Error of the final latents: lower is more exact, further left is smaller"
SIZE_INCHES = (11, 5.2)
DPI = 150
INK, MUTED, GRID, MARK = "#1f2328", "#656d76", "#e6e8eb", "#1f6feb"
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Bits: points nearer than this share a column of labels, which stands so far to their right.
COLUMN_GAP = 1.0
LABEL_OFFSET = 0.45
# Bits left of the first point, and right of the last for its labels.
MARGINS = (0.5, 2.6)
# Least distance of two labels, as a share of the height.
LABEL_STEP = 0.05
# The y axis reaches so far, as a factor, beyond the points.
HEADROOM = 1.5


def draw(rows: Sequence[Row], path: str) -> None:
    """Write the plot of `rows` to `path`, a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.output_error is not None]
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
    _set_axes(panels[0], rows)
    for panel, model in zip(panels, models, strict=True):
        _draw_panel(panel, model, [row for row in rows if row.model == model])
    panels[0].set_ylabel("output error (log scale)", color=MUTED)
    _add_legend(figure)
    figure.suptitle(TITLE, color=INK, fontsize=12, weight="bold")
    figure.savefig(path)


def _set_axes(panel, rows: Sequence[Row]) -> None:
    """Set the limits and ticks, which the panels share."""
    bits = [row.bits for row in rows]
    errors = [row.output_error for row in rows]
    low, high = min(errors) / HEADROOM, max(errors) * HEADROOM
    panel.set_xlim(min(bits) - MARGINS[0], max(bits) + MARGINS[1])
    panel.set_xticks(range(math.floor(min(bits)), math.floor(max(bits)) + 1))
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.minorticks_off()


def _draw_panel(panel, model: str, rows: Sequence[Row]) -> None:
    panel.set_title(model, loc="left", color=INK, fontsize=11)
    panel.set_xlabel("bits per weight of the quantized layers, scales included", color=MUTED)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(GRID)
    panel.tick_params(colors=MUTED, length=0)
    for column in _columns(rows):
        _label(panel, column)
    for row in rows:
        fill = MARK if row.rounds_input else "white"
        panel.plot(row.bits, row.output_error, "o", ms=7, mfc=fill, mec=MARK, mew=1.6, zorder=3)


def _columns(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows in groups that lie apart along x."""
    ordered = sorted(rows, key=lambda row: row.bits)
    columns = [[ordered[0]]]
    for before, row in pairwise(ordered):
        if row.bits - before.bits > COLUMN_GAP:
            columns.append([])
        columns[-1].append(row)
    return columns


def _label(panel, rows: Sequence[Row]) -> None:
    """Write the rows' formats in a column to their right, each with a line to its point."""
    rows = sorted(rows, key=lambda row: row.output_error)
    low, high = map(math.log, panel.get_ylim())
    heights = spread([math.log(row.output_error) for row in rows], (high - low) * LABEL_STEP)
    x = max(row.bits for row in rows) + LABEL_OFFSET
    for row, height in zip(rows, heights, strict=True):
        y = math.exp(height)
        panel.plot([row.bits, x - 0.06], [row.output_error, y], color=MUTED, lw=0.6, zorder=2)
        panel.text(x, y, row.format, va="center", fontsize=9, color=INK)


def spread(places: Sequence[float], step: float) -> list[float]:
    """Return ascending `places` moved as little as keeps neighbours `step` apart.

    Places that would touch form a block around their mean; blocks that touch are joined.
    """
    blocks: list[list[float]] = []
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and _start(blocks[-1], step) - _end(blocks[-2], step) < step:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_start(block, step) + index * step for block in blocks for index in range(len(block))]


def _start(block: Sequence[float], step: float) -> float:
    return sum(block) / len(block) - (len(block) - 1) * step / 2


def _end(block: Sequence[float], step: float) -> float:
    return _start(block, step) + (len(block) - 1) * step


def _add_legend(figure) -> None:
    from matplotlib.lines import Line2D

    style = {"marker": "o", "color": MARK, "linestyle": "none", "markeredgewidth": 1.6}
    marks = [
        Line2D([], [], **style, label="weights and layer inputs rounded"),
        Line2D([], [], **style, markerfacecolor="white", label="weights rounded only"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
