"""What the commands share that write a checkpoint: their options, the work, what they print."""

import argparse
import contextlib
import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

from . import output

# Of glibc's malloc.h.
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD_BYTES = 1 << 24

WORST = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --device, --overwrite and --json."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no progress")


def run(args: argparse.Namespace, title: str, work: Callable, *words, **options) -> None:
    """Print what `work(source, target, *words, **options)` gave, and its progress until then."""
    _return_freed_memory()
    with contextlib.ExitStack() as stack:
        if not args.json:
            options["progress"] = stack.enter_context(output.Progress(title))
        device = _device(args.device)
        options |= {"device": device, "overwrite": args.overwrite}
        result = work(args.source, args.target, *words, **options)
    if args.json:
        output.as_json(_as_dict(result))
    else:
        _print(result)


def _return_freed_memory() -> None:
    """Have glibc give large blocks back when they are freed: kept for reuse they double the peak.

    Elsewhere than on glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")


def _as_dict(result) -> dict[str, Any]:
    model = result.plan.model
    errors = _by_error(result.records)
    return {
        "path": result.path,
        "family": model.family.name,
        "variant": model.variant,
        "recipe": result.plan.recipe.name,
        "source_bytes": result.source_bytes,
        "result_bytes": result.result_bytes,
        "seconds": result.seconds,
        "source_bytes_per_second": result.source_bytes / result.seconds,
        "mean_error": _mean_error(errors),
        "worst": [{"layer": r.name, "error": r.error} for r in errors[:WORST]],
        "notes": result.plan.notes,
        "layers": [dataclasses.asdict(r) for r in result.records],
    }


def _by_error(records) -> list:
    """Return the records that have an error, worst first."""
    return sorted((r for r in records if r.error is not None), key=lambda r: -r.error)


def _mean_error(records) -> float | None:
    return sum(r.error for r in records) / len(records) if records else None


def _print(result) -> None:
    model = result.plan.model
    print(f"{result.path}: {model.family.title}, {model.variant}")
    for note in result.plan.notes:
        print(note)
    by_format: dict[str, list] = {}
    for record in result.records:
        by_format.setdefault(record.format or "kept", []).append(record)
    output.table(
        (name, output.several(len(found), "layer"), output.size(sum(r.size_bytes for r in found)))
        for name, found in by_format.items()
    )
    share = result.result_bytes / result.source_bytes
    speed = result.source_bytes / result.seconds
    print(
        f"{output.size(result.source_bytes)} became {output.size(result.result_bytes)} "
        f"({share:.0%}) in {output.duration(result.seconds)}, {output.size(speed)}/s of source"
    )
    errors = _by_error(result.records)
    if errors:
        print(f"relative error of the weights: mean {_mean_error(errors):.2%}, worst")
        output.table((f"{r.error:.2%}", r.name, r.format) for r in errors[:WORST])
    _print_kept(by_format.get("kept", []))


def _print_kept(records) -> None:
    reasons: dict[str, list[str]] = {}
    for record in records:
        reasons.setdefault(record.reason, []).append(record.name)
    if reasons:
        print("kept as they were:")
        output.table(
            (output.several(len(names), "layer"), f"{reason}: {output.shortened(names)}")
            for reason, names in reasons.items()
        )
