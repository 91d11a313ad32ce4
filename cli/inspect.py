"""tell what a checkpoint is, and what is wrong with it

Reads headers and scales, not the weights: `lowbit convert` tells of NaN in those. Exit code 1 when
ComfyUI or LowBit would load the file wrongly, or refuse it; 2 when it cannot be read at all.
"""

import argparse
import textwrap

from . import output

NAME = "inspect"
BAD = 1
WIDTH = 96


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=".safetensors file, or a folder of shards")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..quant.inspect_file import inspect_file

    report = inspect_file(args.file)
    if args.json:
        output.as_json(report)
    else:
        _print(report)
    return BAD if report.errors else 0


def _print(report) -> None:
    prefix = f", key prefix {report.prefix}" if report.prefix else ""
    print(f"{report.path}: {report.title}, {report.variant}, {report.blocks} blocks{prefix}")
    print(f"{output.size(report.size_bytes)} in {output.several(report.tensors, 'tensor')}")
    if report.outside:
        print(f"{output.several(report.outside, 'tensor')} of another model (VAE, text encoder)")
    output.table(
        (name, output.several(group.count, "layer"), output.size(group.size_bytes))
        for name, group in report.formats.items()
    )
    quantized = report.bits_quantized
    in_layers = f"{quantized:.2f} in quantized layers, " if quantized is not None else ""
    print(f"bits per weight: {in_layers}{report.bits:.2f} in the whole file")
    for problem in report.problems:
        _print_problem(problem)
    affected = sorted({who for problem in report.errors for who in problem.affects})
    if affected:
        print(f"would load wrongly, or not at all, in {' and in '.join(affected)}")
    else:
        print("its header and scales show nothing that would load wrongly; weights were not read")


def _print_problem(problem) -> None:
    where = f" in {' and '.join(problem.affects)}" if problem.affects else ""
    count = f", {output.several(len(problem.layers), 'layer')}" if problem.layers else ""
    print(f"{problem.severity}{where}: {problem.code}{count}")
    first = f"{problem.layers[0]}: " if problem.layers else ""
    for text in (f"{first}{problem.detail}", problem.meaning, problem.advice):
        print(textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    "))
