"""Linear layers with 4-bit weights: ours, the host's way (comfy-kitchen) and bf16, side by side.

Run on a GPU: `python -m tests.bench.bench_linear4`. The weight's decoding and the activation's
quantization are included everywhere. Results go to docs/results/linear4.jsonl.
"""

import argparse
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops.linear import linear
from lowbit.ops.linear.four_bit import EIGHT_BITS, GROUPS
from lowbit.quant import formats
from tests.bench import bench_linear, runner

RESULTS = "linear4"
WAYS = ("w4a8", "w4a16")
ALL_WAYS = (*WAYS, *EIGHT_BITS)
FORMATS = tuple(name for name in formats.names() if formats.get(name).layout.scheme in GROUPS)
# How block scales are chosen: by their error, as our quantizers do, or as comfy-kitchen's does.
SEARCHED, ABSMAX = SCALES = ("searched", "absmax")
# Wan 5B's widths are measured for 8 bits; here are those of the goals.
LEFT_OUT = "wan 5B"
HOST = "host nvfp4"
# Twice the error of a 4-bit weight.
MAX_ERROR = 0.25


def shapes(tokens: Sequence[int] = ()) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, M, N, K) of the layers of real models, then of a few tokens.

    tokens: M of each layer instead of these, where given.
    """
    seen = set()
    for name, m, n, k in bench_linear.shapes():
        if name.startswith(LEFT_OUT):
            continue
        if not tokens:
            yield name, m, n, k
        elif (n, k) not in seen:
            seen.add((n, k))
            yield from ((name, few, n, k) for few in tokens)


def quantized(name: str, weight: torch.Tensor, scales: str) -> QuantizedTensor:
    """Return a weight in a format, under our layout; scales: one of SCALES, ABSMAX of NVFP4 only.

    Raises ValueError for ABSMAX of other formats: comfy-kitchen has them not.
    """
    fmt = formats.get(name)
    if scales == SEARCHED:
        return fmt.quantize(weight)
    if name != "nvfp4":
        raise ValueError(f"comfy-kitchen has no quantizer for {name}")
    theirs = QuantizedTensor.from_float(weight, fmt.layout.kitchen_layout)
    return QuantizedTensor(theirs._qdata, fmt.layout.__name__, theirs._params)


def runs(
    x: torch.Tensor, weights: dict[str, QuantizedTensor], bias: torch.Tensor, ways=WAYS
) -> Iterator[tuple[str, object]]:
    """Yield (name, function) of each way to run the layer with 4-bit weights: the host's, ours."""
    for name, packed in weights.items():
        if name == "nvfp4":
            layout = packed.layout_cls.kitchen_layout
            theirs = QuantizedTensor(packed._qdata, layout, packed._params)
            yield HOST, lambda w=theirs: F.linear(x, w, bias)
        for way in ways:
            yield f"{way} {name}", lambda w=packed, way=way: linear(x, w, bias, way)


def bench(
    m: int, n: int, k: int, names=FORMATS, scales: str = SEARCHED, ways=WAYS
) -> dict[str, dict]:
    """Return, by name of the way to run it, times, errors and rate of a layer [n, k], m tokens.

    error: against float64 with the weight that was quantized; error_weight: with the 4-bit one.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(m, k, generator=generator, device="cuda").bfloat16()
    x[:, :: bench_linear.OUTLIERS] *= 10
    weight = (torch.randn(n, k, generator=generator, device="cuda") * 0.02).bfloat16()
    bias = torch.randn(n, generator=generator, device="cuda").bfloat16()
    rows = x[: bench_linear.CHECKED_ROWS].double()
    plain = F.linear(rows, weight.double(), bias.double())
    weights = {name: quantized(name, weight, scales) for name in names}
    timed = {"bf16": lambda: F.linear(x, weight, bias), **dict(runs(x, weights, bias, ways))}
    errors = {}
    for name, run in timed.items():
        got, four = run()[: len(rows)], plain
        if name != "bf16":
            values = weights[name.split()[-1]].dequantize()
            four = F.linear(rows, values.double(), bias.double())
        errors[name] = {
            "error": runner.relative_error(got, plain),
            "error_weight": runner.relative_error(got, four),
        }
        # Not `>`, which NaN would pass.
        if not errors[name]["error"] <= MAX_ERROR:
            raise RuntimeError(f"{name} errs by {errors[name]} at {m}x{n}x{k}: not timed")
    return {
        name: {
            **vars(timing),
            **errors[name],
            "tflops": 2 * m * n * k / timing.median_ms / 1e9,
        }
        for name, timing in runner.measure(timed).items()
    }


def row(name: str, m: int, n: int, k: int, results: dict[str, dict]) -> str:
    """Return the table's line: each way's microseconds, rate and error, ours with its ratios."""
    bf16, host = (results.get(way, {}).get("median_ms") for way in ("bf16", HOST))
    cells = [f"{name} {m}x{n}x{k}"]
    for way, result in results.items():
        ms = result["median_ms"]
        cells.append(
            f"{way} {ms * 1e3:.0f} us, {result['tflops']:.0f}, err {result['error']:.4f} "
            f"({result['error_weight']:.4f}), {bf16 / ms:.2f}x bf16"
            + (f", {host / ms:.2f}x host" if host else "")
        )
    return "| " + " | ".join(cells) + " |"


@torch.inference_mode()
def main() -> None:
    """Time every shape, print the table, append the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only shapes whose name holds this")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="M of every layer")
    parser.add_argument(
        "--format", action="append", choices=FORMATS, help="may be given again (default: all)"
    )
    parser.add_argument("--scales", choices=SCALES, default=SEARCHED, help="of blocks of weights")
    parser.add_argument(
        "--way", action="append", choices=ALL_WAYS, help=f"may be given again (default: {WAYS})"
    )
    arguments = parser.parse_args()
    names, scales = arguments.format or FORMATS, arguments.scales
    if scales == ABSMAX and set(names) != {"nvfp4"}:
        parser.error("--scales absmax goes with --format nvfp4")
    for name, m, n, k in shapes(arguments.tokens):
        if arguments.only in name:
            results = bench(m, n, k, names, scales, arguments.way or WAYS)
            print(row(name, m, n, k, results), flush=True)
            record = {"layer": name, "M": m, "N": n, "K": k, "scales": scales, "results": results}
            runner.append(RESULTS, record)


if __name__ == "__main__":
    main()
