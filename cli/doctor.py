"""tell what this machine has, and how each number format runs on it"""

import argparse

from . import output

NAME = "doctor"
MISSING = "missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..quant.doctor import diagnose

    found = diagnose()
    if args.json:
        output.as_json(found)
    else:
        _print(found)
    return 0


def _print(found) -> None:
    output.table(
        [
            ("python", f"{found.python} on {found.platform}"),
            ("torch", f"{found.torch}, {_build(found.cuda)}"),
            *(("gpu", _gpu(gpu)) for gpu in found.gpus or [None]),
            ("comfy-kitchen", found.kitchen),
            *((f"  {b.name}", b.reason or "on") for b in found.kitchen_backends),
            *((name, version or MISSING) for name, version in found.packages.items()),
            ("ComfyUI", _host(found.host)),
            ("cache", found.cache),
            ("tuned", _tuned(found.tuned)),
        ],
        indent="",
    )
    print(f"attention that `auto` takes on {found.device}, for heads of 128 channels:")
    output.table(map(_attention, found.attention))
    print(f"formats on {found.device}:")
    output.table((f.format, f.backend, f.runs) for f in found.formats)
    print("4-bit weights, by the arithmetic that a model is loaded or quantized with:")
    output.table(_grouped(found.formats, "arithmetics"))
    print("backends that do not fit:")
    output.table(_grouped(found.formats, "unfit") or [("none",)])


def _attention(row) -> tuple[str, str, str, str]:
    hides = "no mask" if row.hides == "unmasked" else "a mask of keys"
    return hides, f"from {row.tokens_min} tokens on", row.way, row.source


def _grouped(formats, field: str) -> list[tuple[str, str, str]]:
    """Return rows (name, formats, text) of a field name → text; formats told the same share one."""
    rows: dict[tuple[str, str], list[str]] = {}
    for support in formats:
        for told in getattr(support, field).items():
            rows.setdefault(told, []).append(support.format)
    return [(name, ", ".join(names), text) for (name, text), names in rows.items()]


def _build(cuda: str | None) -> str:
    return f"CUDA {cuda}" if cuda else "built without CUDA"


def _gpu(gpu) -> str:
    if gpu is None:
        return "none that torch sees"
    major, minor = gpu.capability
    return f"{gpu.name}, capability {major}.{minor}, {output.size(gpu.memory_bytes)}"


def _host(host) -> str:
    if host is None:
        return "not found (COMFYUI_PATH, ~/ComfyUI)"
    return f"{host.version or 'unknown version'} in {host.path}"


def _tuned(tuned) -> str:
    if tuned.problem:
        return f"ignored: {tuned.problem}"
    if not tuned.tiles + tuned.backends + tuned.attention:
        return "nothing in use (`lowbit tune` measures what is fastest on a GPU)"
    counts = (
        f"{output.several(tuned.tiles, 'tile')} and {output.several(tuned.backends, 'backend')}"
    )
    if tuned.attention:
        counts += f", attention for {output.several(tuned.attention, 'number')} of tokens"
    return f"{counts} in use, from {tuned.path}"
