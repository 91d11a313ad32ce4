"""tell how far two checkpoints of one model are apart

The error of a layer is |A - B| / |A| in L2, of dequantized weights. Key prefixes and diffusers'
names are aligned.
"""

import argparse
import contextlib

from . import output

NAME = "compare"
TOP = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument(
        "--top", type=_count, default=TOP, metavar="N", help=f"show the N worst (default: {TOP})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("it must not be negative")
    return value


def run(args: argparse.Namespace) -> int:
    from ..quant.compare import compare

    with contextlib.ExitStack() as stack:
        options = {}
        if not args.json:
            options["tick"] = stack.enter_context(output.Progress("compare", unit_bytes=False))
        result = compare(args.a, args.b, **options)
    if args.json:
        output.as_json(result)
    else:
        _print(result, args.top)
    return 0


def _print(result, top: int) -> None:
    apart = [d for d in result.differences if d.error != 0]
    if apart:
        print("relative error, worst first:")
        output.table((_error(d), d.name, " → ".join(d.formats)) for d in apart[:top])
        if len(apart) > top:
            print(f"  and {len(apart) - top} more")
    linear = [d.error for d in apart if d.linear and d.error is not None]
    if linear:
        print(f"mean over {output.several(len(linear), 'linear layer')} that differ: ", end="")
        print(f"{sum(linear) / len(linear):.2%}")
    print(f"{output.several(len(result.differences) - len(apart), 'tensor')} equal")
    for side, names in (("A", result.only_a), ("B", result.only_b)):
        if names:
            print(f"only in {side}: {output.several(len(names), 'tensor')}")
            for name in names:
                print(f"  {name}")


def _error(difference) -> str:
    if difference.error is None:
        a, b = (list(shape) for shape in difference.shapes)
        return f"{a} and {b}"
    return f"{difference.error:.3%}"
