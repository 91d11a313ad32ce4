"""bring a quantized checkpoint of another program to ComfyUI's layout

Numbers stay as they are, bit for bit, wherever one of the formats holds them: nibbles are swapped,
block scales put in ComfyUI's order, scales renamed, layers marked. Layers whose scales no format
has are quantized again, and their error is told. What a file does not show has to be said with
--from; `lowbit inspect` tells what it shows.
"""

import argparse

from . import writing

NAME = "convert"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("target", metavar="DST")
    parser.add_argument(
        "--from",
        dest="dialect",
        metavar="NAME",
        help="who wrote SRC: modelopt, lightx2v, convert_to_quant; or the format of layers in "
        "ComfyUI's own layout whose marking is lost, such as nvfp4 or int8_convrot",
    )
    parser.add_argument(
        "--scales",
        choices=("flat", "swizzled", "twice"),
        help="in which order block scales lie in SRC, if the file does not show it; with "
        "--from, of the layers that it names alone, but for those that show to be as marked",
    )
    parser.add_argument(
        "--format",
        default="int8_convrot",
        metavar="F",
        help="for layers whose scales no format has (default: int8_convrot)",
    )
    writing.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..quant import dialects
    from ..quant.convert_file import convert_file

    if args.dialect not in (None, *dialects.names()):
        known = ", ".join(dialects.names())
        raise ValueError(f"--from {args.dialect}: unknown; known are {known}")
    options = {"dialect": args.dialect, "order": args.scales, "format_name": args.format}
    writing.run(args, "convert", convert_file, **options)
    return 0
