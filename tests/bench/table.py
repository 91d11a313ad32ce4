"""The README's table of measured linear layers, made from the file of results."""

import json

from tests.bench.runner import RESULTS

# What the table calls a way to run a layer -> its names in the file; `auto` takes the first.
COLUMNS = {
    "bf16": ("bf16",),
    "FP8, comfy-kitchen": ("kitchen fp8_e4m3",),
    "FP8, LowBit": ("hopper fp8_e4m3", "triton fp8_e4m3"),
    "INT8 convrot, comfy-kitchen": ("kitchen int8_convrot",),
    "INT8 convrot, LowBit": ("hopper int8_convrot", "triton int8_convrot"),
}
# Sampling lives in the layers with many tokens; the others are in the file.
MIN_TOKENS = 4096


def table() -> str:
    """Return a Markdown table of TFLOP/s, the best of a row in bold, with errors."""
    runs = [json.loads(line) for line in (RESULTS / "linear.jsonl").read_text().splitlines()]
    runs = [run for run in runs if run["M"] >= MIN_TOKENS]
    about = {
        f"{r['gpu']}, torch {r['torch']}, Triton {r['triton']}, comfy-kitchen {r['comfy_kitchen']}"
        for r in runs
    }
    lines = ["; ".join(sorted(about)) + ". TFLOP/s (relative error against float64):", ""]
    head = ["layer", "tokens × N × K", *COLUMNS]
    lines += [_row(head), _row(["---"] * len(head))]
    for run in runs:
        ran = run["results"]
        results = [next(ran[n] for n in names if n in ran) for names in COLUMNS.values()]
        best = max(r["tflops"] for r in results)
        size = f"{run['M']:,} × {run['N']:,} × {run['K']:,}"
        lines.append(_row([run["layer"], size, *(_cell(r, best) for r in results)]))
    return "\n".join(lines)


def _cell(result: dict, best: float) -> str:
    speed = f"{result['tflops']:,.0f}"
    return f"{f'**{speed}**' if result['tflops'] == best else speed} ({result['error']:.4f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
