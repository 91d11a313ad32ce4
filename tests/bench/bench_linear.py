"""Linear layers of real models in 8 bits: ours, comfy-kitchen's and bf16, side by side.

Run on a GPU: `python -m tests.bench.bench_linear`. Quantization of the activation is included
everywhere. Prints a table and appends it to docs/results/linear.jsonl.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from lowbit.ops import registry
from lowbit.ops.linear import linear
from lowbit.ops.scaled_mm import hopper
from lowbit.ops.scaled_mm.check import MANY_ROWS
from lowbit.quant import families, formats
from tests.bench import runner

# Our format, and the peer's that holds the same kind of weight.
PAIRS = (
    ("fp8_e4m3", "fp8_e4m3"),
    ("fp8_e4m3_rowwise", "fp8_e4m3"),
    ("int8_convrot", "int8_convrot"),
)
SMALL_M = (1, 16, 512)
MODELS = (("wan", "14B"), ("wan", "5B"), ("qwen_image", "20B"))
# Rows that are checked against float64, and channels that are outliers, ten times as large.
CHECKED_ROWS = 256
OUTLIERS = 97
# Refuse to time anything that errs more: twice FP8's error.
MAX_ERROR = 0.08


def shapes() -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, M, N, K) of the layers of real models, then of a few tokens."""
    seen = set()
    for family, size in MODELS:
        for layer in families.get(family).shapes[size]:
            for tokens in (*layer.tokens, *(SMALL_M if size != "5B" else ())):
                key = (tokens, layer.N, layer.K)
                if key not in seen:
                    seen.add(key)
                    yield f"{family} {size} {layer.name}", *key


def runs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[tuple[str, object]]:
    """Yield (name, function) of each way to run the layer: bf16, then ours and the peer's."""
    yield "bf16", lambda: F.linear(x, weight, bias)
    peers = {}
    for ours, theirs in PAIRS:
        packed = formats.get(ours).quantize(weight)
        if theirs not in peers:
            peers[theirs] = packed if ours == theirs else formats.get(theirs).quantize(weight)
            yield f"kitchen {theirs}", lambda w=peers[theirs]: linear(x, w, bias, "kitchen")
        yield f"triton {ours}", lambda w=packed: linear(x, w, bias, "triton")
        if len(x) >= MANY_ROWS and registry.capability(x.device) == hopper.HOPPER:
            yield f"hopper {ours}", lambda w=packed: linear(x, w, bias, "hopper")


def bench(m: int, n: int, k: int) -> dict[str, dict]:
    """Return, by name of the way to run it, times, error and rate of a layer [n, k], m tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(m, k, generator=generator, device="cuda").bfloat16()
    x[:, ::OUTLIERS] *= 10
    weight = (torch.randn(n, k, generator=generator, device="cuda") * 0.02).bfloat16()
    bias = torch.randn(n, generator=generator, device="cuda").bfloat16()
    rows = x[:CHECKED_ROWS].double()
    want = F.linear(rows, weight.double(), bias.double())
    ways = dict(runs(x, weight, bias))
    errors = {}
    for name, run in ways.items():
        errors[name] = runner.relative_error(run()[:CHECKED_ROWS], want)
        # Not `>`, which NaN would pass.
        if not errors[name] <= MAX_ERROR:
            raise RuntimeError(f"{name} errs by {errors[name]:.3f} at {m}x{n}x{k}: not timed")
    return {
        name: {
            **vars(timing),
            "error": errors[name],
            "tflops": 2 * m * n * k / timing.median_ms / 1e9,
        }
        for name, timing in runner.measure(ways).items()
    }


def row(name: str, m: int, n: int, k: int, results: dict[str, dict]) -> str:
    """Return the table's line: each way's microseconds and rate, ours with its ratios."""
    bf16 = results["bf16"]["median_ms"]
    cells = [f"{name} {m}x{n}x{k}", f"{bf16 * 1e3:.0f} us, {results['bf16']['tflops']:.0f}"]
    for ours, theirs in PAIRS:
        mine = results.get(f"hopper {ours}", results[f"triton {ours}"])
        peer = results[f"kitchen {theirs}"]
        cells.append(
            f"{mine['median_ms'] * 1e3:.0f} us, {mine['tflops']:.0f}, err {mine['error']:.4f}, "
            f"{peer['median_ms'] / mine['median_ms']:.2f}x kitchen (err {peer['error']:.4f}), "
            f"{bf16 / mine['median_ms']:.2f}x bf16, "
            f"host {mine['host_us']:.0f} / {peer['host_us']:.0f} us"
        )
    return "| " + " | ".join(cells) + " |"


@torch.inference_mode()
def main() -> None:
    """Time every shape, print the table, append the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only shapes whose name holds this")
    parser.add_argument("--least", type=int, default=0, help="only shapes of so many tokens")
    parser.add_argument("--most", type=int, help="only shapes of so many tokens at most")
    arguments = parser.parse_args()
    print("| layer M x N x K | bf16 | " + " | ".join(ours for ours, _ in PAIRS) + " |")
    print("|---" * (2 + len(PAIRS)) + "|")
    for name, m, n, k in shapes():
        in_range = arguments.least <= m <= (arguments.most or m)
        if arguments.only in name and in_range:
            results = bench(m, n, k)
            print(row(name, m, n, k, results), flush=True)
            runner.append("linear", {"layer": name, "M": m, "N": n, "K": k, "results": results})


if __name__ == "__main__":
    main()
