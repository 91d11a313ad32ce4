"""q, k and v of one input: quantized once, against three layers alone and against bare products.

Run on a GPU: `python -m tests.bench.bench_shared_input`. Prints a table and appends it to
docs/results/shared_input.jsonl.
"""

from collections.abc import Iterator

import torch

from lowbit.ops.linear import linear, quantize_activation
from lowbit.quant import families, formats
from tests.bench import runner

NAMES = ("fp8_e4m3", "fp8_e4m3_rowwise", "int8_convrot")
LAYERS = (
    ("wan", "14B", "self_attn.q"),
    ("wan", "5B", "self_attn.q"),
    ("qwen_image", "20B", "attn.to_q"),
)
READERS = 3


def shapes() -> Iterator[tuple[str, int, int, int]]:
    """Yield (model, tokens, N, K) of the attention layers of real models."""
    for family, size, name in LAYERS:
        layer = next(x for x in families.get(family).shapes[size] if x.name == name)
        for tokens in layer.tokens:
            yield f"{family} {size}", tokens, layer.N, layer.K


def bench(m: int, n: int, k: int, name: str) -> dict[str, dict]:
    """Return the times of three layers [n, k] that read m tokens, by the way they are run."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights = [
        formats.get(name).quantize(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02)
        for _ in range(READERS)
    ]
    ready = quantize_activation(x, weights[0])

    def shared():
        rows = quantize_activation(x, weights[0])
        return [linear(rows, w, backend="triton") for w in weights]

    alone = [linear(x, w, backend="triton") for w in weights]
    if not all(torch.equal(a, b) for a, b in zip(alone, shared(), strict=True)):
        raise RuntimeError(f"{name}: layers that share an input give other results: not timed")
    timings = runner.measure(
        {
            "shared": shared,
            "alone": lambda: [linear(x, w, backend="triton") for w in weights],
            "quantize": lambda: quantize_activation(x, weights[0]),
            "products": lambda: [linear(ready, w, backend="triton") for w in weights],
        }
    )
    return {way: vars(timing) for way, timing in timings.items()}


@torch.inference_mode()
def main() -> None:
    """Time every shape and format, print the table, append the results."""
    for model, m, n, k in shapes():
        for name in NAMES:
            results = bench(m, n, k, name)
            ms = {way: result["median_ms"] for way, result in results.items()}
            floor = ms["products"] + ms["quantize"]
            print(
                f"{model} {m} x {n} x {k} {name:17} shared {ms['shared'] * 1e3:7.0f} us, "
                f"{ms['shared'] / floor:.3f} of bare products + one pass, "
                f"{ms['alone'] / ms['shared']:.3f}x three alone",
                flush=True,
            )
            record = {"model": model, "M": m, "N": n, "K": k, "format": name, "results": results}
            runner.append("shared_input", record)


if __name__ == "__main__":
    main()
