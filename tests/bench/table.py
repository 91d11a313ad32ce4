"""The README's table of measured linear layers, made from the file of results."""

import json

from tests.bench.runner import RESULTS

# Ways to run a layer, as the file names them, and what the table calls them.
COLUMNS = {
    "bf16": "bf16",
    "kitchen fp8_e4m3": "FP8, comfy-kitchen",
    "triton fp8_e4m3": "FP8, LowBit",
    "kitchen int8_convrot": "INT8 convrot, comfy-kitchen",
    "triton int8_convrot": "INT8 convrot, LowBit",
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
    head = ["layer", "tokens × N × K", *COLUMNS.values()]
    lines += [_row(head), _row(["---"] * len(head))]
    for run in runs:
        results = {name: run["results"][name] for name in COLUMNS}
        best = max(r["tflops"] for r in results.values())
        size = f"{run['M']:,} × {run['N']:,} × {run['K']:,}"
        lines.append(_row([run["layer"], size, *(_cell(r, best) for r in results.values())]))
    return "\n".join(lines)


def _cell(result: dict, best: float) -> str:
    speed = f"{result['tflops']:,.0f}"
    return f"{f'**{speed}**' if result['tflops'] == best else speed} ({result['error']:.4f})"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
