"""measure what is fastest on this GPU, and remember it

Times attention by every way of 8 bits or more that runs here. Then our kernels' tiles and whole
linear layers, for the layers of Wan and Qwen-Image, of a checkpoint, or of given shapes, in INT8,
FP8 and 4 bits. A tile whose result differs from the reference's cannot win, nor can a way of
attention that errs by more than 0.045. What beats the built-in choice by more than the noise is
kept in tuning.json in the user's folder of caches, or in the folder LOWBIT_CACHE, for this kind of
GPU and these versions.
Exit code 1 when a result was wrong.
"""

import argparse
import contextlib
import math

from . import output

NAME = "tune"
WRONG = 1
# Half an hour, in which a fast GPU is done with everything of 8 bits.
MAX_SECONDS = 1800
MICRO = 1000
BITS = (4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shape",
        action="append",
        metavar="M,N,K",
        help="rows of input, outputs and inputs of a layer; may be given again",
    )
    what.add_argument("--model", metavar="FILE", help="the layers of a checkpoint")
    what.add_argument(
        "--attention",
        nargs="?",
        type=_counts,
        const=(),
        metavar="L,L,...",
        help="attention alone, of so many tokens (default: 512 to 32768)",
    )
    what.add_argument("--show", action="store_true", help="print what is remembered, and stop")
    what.add_argument("--clear", action="store_true", help="forget it, for all GPUs, and stop")
    parser.add_argument(
        "--rows",
        type=_counts,
        default=(),
        metavar="M,M,...",
        help="numbers of rows to measure linear layers with, and no attention",
    )
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument(
        "--max-seconds",
        type=_seconds,
        default=MAX_SECONDS,
        metavar="S",
        help=f"about how long to measure (default: {MAX_SECONDS})",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=BITS,
        help="only weights of so many bits, and no attention (default: all)",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure, and remember nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no progress")


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers M,M,... are wanted") from None


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("it must be above zero")
    return value


def run(args: argparse.Namespace) -> int:
    if args.show:
        return _show(args.json)
    if args.clear:
        return _clear(args.json)
    from ..quant.tune import gpu_bench, tune

    if args.rows and args.shape:
        raise ValueError("--rows goes with --model or without any; --shape names the rows itself")
    if args.attention is not None and (args.rows or args.bits):
        raise ValueError("--rows and --bits are of linear layers; --attention measures none")
    wanted = _problems(args)
    bench = gpu_bench(args.device)
    if args.bits:
        bench = bench.only(args.bits)
    with contextlib.ExitStack() as stack:
        options = {}
        if not args.json:
            print(f"tuning {output.several(len(wanted), 'shape')} on {bench.gpu.name}")
            progress = output.Progress("tune", unit_bytes=False)
            options["progress"] = stack.enter_context(progress)
        report = tune(
            wanted, bench, store=not args.dry_run, max_seconds=args.max_seconds, **options
        )
    if args.json:
        output.as_json(report)
    else:
        _print(report)
    return WRONG if any(result.wrong for result in report.results) else 0


def _problems(args: argparse.Namespace):
    from ..quant.tune import problems

    rows = [problems.check_rows(m) for m in args.rows]
    if args.attention is not None:
        return problems.of_attention(args.attention)
    if args.shape:
        return problems.distinct(problems.named(text) for text in args.shape)
    if args.model:
        return problems.of_checkpoint(args.model, rows)
    layers = problems.of_families(rows)
    return layers if rows or args.bits else [*problems.of_attention(), *layers]


def _print(report) -> None:
    done = [result for result in report.results if not result.note]
    won = [result for result in done if result.winner]
    layers = [result for result in won if not _attends(result.op)]
    if layers:
        print("faster than the built-in choice:")
        output.table(_line(result) for result in layers)
    _print_attention(report)
    counts = {word: sum(len(getattr(r, word)) for r in done) for word in ("failed", "wrong")}
    tried, untried = (sum(getattr(r, word) for r in done) for word in ("tried", "untried"))
    print(
        f"{output.several(len(done), 'measurement')} in {output.duration(report.seconds)}: "
        f"{len(won)} beat the built-in choice, {len(done) - len(won)} did not"
    )
    print(
        f"{output.several(tried, 'candidate')} timed, {counts['failed']} could not run, "
        f"{counts['wrong']} gave wrong results, {untried} not reached"
    )
    for result in report.results:
        for name in result.wrong:
            print(f"WRONG RESULT, please report: {_problem(result)}: {name}")
        if result.note:
            print(f"not measured: {_problem(result)}: {result.note}")
    if report.unreached:
        print(f"no time was left for {output.several(report.unreached, 'measurement')}")
    slower = [r for r in done if _slower_than_plain(r)]
    if slower:
        print("slower than bf16 with a weight that was never quantized:")
        output.table(
            (_problem(r), f"{_microseconds(_taken_ms(r))}, bf16 {_microseconds(_plain_ms(r))}")
            for r in slower
        )
    print(f"remembered in {report.path}" if report.stored else "not remembered: --dry-run")


def _print_attention(report) -> None:
    done = [r for r in report.results if _attends(r.op)]
    found = [r for r in done if r.times_ms]
    if found:
        print("attention, from so many queries and keys on:")
        output.table(_attention_line(r) for r in sorted(found, key=lambda r: (r.scheme, r.m)))
    left_out: dict[tuple[str, str], list[str]] = {}
    for result in done:
        for told in result.failed.items():
            left_out.setdefault(told, []).append(f"{result.m} {result.scheme}")
    for (name, reason), where in left_out.items():
        print(f"left out of attention: {name}: {reason} ({', '.join(where)})")
    for reason in report.absent.values():
        print(f"left out of attention: {reason}")


def _attention_line(result) -> tuple[str, ...]:
    taken = result.winner or result.default
    before, ms = result.times_ms.get(result.default), result.times_ms.get(taken)
    error = result.errors.get(taken)
    if result.winner:
        faster = f"{result.gain:.0%} faster" if math.isfinite(result.gain) else "runs"
    else:
        faster = "nothing is faster"
    return (
        f"{result.m} {result.scheme}",
        taken,
        "not timed" if ms is None else _microseconds(ms),
        "" if error is None else f"error {error:.4f}",
        f"torch's own: {'cannot run' if before is None else _microseconds(before)}",
        faster,
        f"then {', '.join(result.ranking[1:])}" if result.ranking[1:] else "",
    )


def _attends(op: str) -> bool:
    from ..ops.attention import OP

    return op == OP


def _problem(result) -> str:
    if _attends(result.op):
        return f"attention {result.scheme} {result.rows} x {result.n}"
    return f"{result.scheme} {result.rows} x {result.n} x {result.k}"


def _line(result) -> tuple[str, ...]:
    before = result.times_ms.get(result.default)
    gain = f"{result.gain:.0%} faster" if math.isfinite(result.gain) else "runs"
    return (
        _problem(result),
        result.winner,
        _microseconds(result.times_ms[result.winner]),
        f"built in: {result.default}",
        "cannot run" if before is None else _microseconds(before),
        gain,
    )


def _microseconds(ms: float) -> str:
    return f"{ms * MICRO:.1f} us"


def _plain_ms(result) -> float | None:
    from ..quant.tune import PLAIN

    return result.times_ms.get(PLAIN)


def _taken_ms(result) -> float:
    return result.times_ms.get(result.winner or result.default, math.inf)


def _slower_than_plain(result) -> bool:
    plain = _plain_ms(result)
    return plain is not None and _taken_ms(result) > plain


def _show(as_json: bool) -> int:
    from ..quant.tune.remembered import in_short, remembered

    found = remembered()
    if as_json:
        output.as_json(found)
        return 0
    print(found.problem or f"{found.path}: {output.several(found.count, 'result')}")
    for part in found.sections:
        about = ", ".join(f"{name} {value}" for name, value in part.mark.items())
        print(f"{'in use' if part.counts else 'not in use here'}: {about}")
        attends = _attends(part.mark.get("op"))
        output.table(
            (
                e.scheme if attends else f"{e.scheme} {e.n} x {e.k}",
                f"{e.m} tokens and more" if attends else f"M up to {e.m}",
                in_short(e.choice),
                _microseconds(e.ms),
                f"instead of {in_short(e.instead_of)}",
                "" if e.instead_ms is None else _microseconds(e.instead_ms),
            )
            for e in part.entries
        )
    return 0


def _clear(as_json: bool) -> int:
    from ..ops import tuning_file

    path = tuning_file.path()
    count = tuning_file.clear(path)
    if as_json:
        output.as_json({"path": str(path), "removed": count})
    else:
        print(f"{path}: {output.several(count, 'result')} removed")
    return 0
