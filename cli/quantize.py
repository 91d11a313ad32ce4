"""write a checkpoint in a number format

SRC is a .safetensors file, or a folder of shards with its index; the weights may be 16 or 32 bits,
or quantized already. DST takes its name in one step when all is written: until then it is absent or
as it was. `lowbit doctor` tells how each format runs on this machine.
"""

import argparse
import pkgutil
from pathlib import Path

from . import writing

NAME = "quantize"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..quant import families

    recipes = ", ".join(("auto", *families.names(), "none"))
    formats = ", ".join(sorted(format_names()))
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")
    parser.add_argument("--format", required=True, metavar="F", help=formats)
    parser.add_argument("--recipe", default="auto", metavar="R", help=f"{recipes} (default: auto)")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave layers whose name holds this as they are; may be given again",
    )
    writing.add_arguments(parser)


def format_names() -> list[str]:
    """Return the names of all formats: those of their files, as importing them takes torch."""
    folder = Path(__file__).parent.parent / "quant" / "formats"
    names = [module.name for module in pkgutil.iter_modules([str(folder)])]
    return [name for name in names if name != "base" and not name.startswith("_")]


def run(args: argparse.Namespace) -> int:
    from ..quant.quantize_file import quantize_file

    options = {"recipe_name": args.recipe, "keep": args.keep}
    writing.run(args, args.format, quantize_file, args.format, **options)
    return 0
