"""The demo's page: table and plot in one HTML file that needs nothing else."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .row import COLUMNS, NOTES, Row, cells

TITLE = "LowBit demo"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #e6e8eb; }
th { color: #656d76; font-weight: 600; }
.number { text-align: right; }
.first td { border-top: 2px solid #656d76; }
img { max-width: 100%; }
"""


def write(rows: Sequence[Row], plot_path: str, path: str) -> None:
    """Write the page with the table of `rows` and the PNG at `plot_path` to `path`."""
    image = base64.b64encode(Path(plot_path).read_bytes()).decode()
    notes = "\n".join(f"<li>{escape(note)}</li>" for note in NOTES)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style></head>
<body>
<h1>{TITLE}</h1>
<p>Two small diffusion transformers in every number format of this pack: how much smaller each
makes them, and how far what they draw moves from the bf16 source.</p>
<img src="data:image/png;base64,{image}" alt="Output error against bits per weight">
{_table(rows)}
<ul>
{notes}
</ul>
</body>
</html>
"""
    Path(path).write_text(page, encoding="utf-8")


def _table(rows: Sequence[Row]) -> str:
    titles, *lines = cells(rows)
    html = [f"<table>\n<thead><tr>{_cells('th', titles)}</tr></thead>\n<tbody>"]
    before = None
    for row, line in zip(rows, lines, strict=True):
        start = "<tr>" if row.model == before else '<tr class="first">'
        html.append(f"{start}{_cells('td', line)}</tr>")
        before = row.model
    return "\n".join([*html, "</tbody>\n</table>"])


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(
        f"<{tag}{' class=number' if column.numeric else ''}>{escape(text)}</{tag}>"
        for column, text in zip(COLUMNS, texts, strict=True)
    )
