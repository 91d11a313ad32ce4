"""quantize two small models to every format and show what that does to them

Makes a small Wan and a small Qwen-Image with random weights in DIR, quantizes them, samples with
them on the CPU, and prints size and error of each format. DIR/demo.html shows the same with a plot.
Takes about half a minute, 120 MB of disk, and the packages diffusers and matplotlib.
"""

import argparse
import textwrap
from pathlib import Path

from . import output

NAME = "demo"
TEXT_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder (default: ./demo)")


def run(args: argparse.Namespace) -> int:
    from ..quant import demo
    from ..quant.demo.row import COLUMNS, NOTES, cells

    with output.Progress("demo", unit_bytes=False) as progress:
        rows = demo.run(args.out, progress)
    lines = cells(rows)
    columns = zip(COLUMNS, zip(*lines, strict=True), strict=True)
    aligned = [_aligned(texts, column.numeric) for column, texts in columns]
    output.table(zip(*aligned, strict=True))
    for note in NOTES:
        print(textwrap.fill(note, TEXT_WIDTH))
    print(f"The page with the plot: {Path(args.out, demo.PAGE)}")
    return 0


def _aligned(texts: tuple[str, ...], right: bool) -> list[str]:
    width = max(map(len, texts))
    return [text.rjust(width) if right else text for text in texts]
