"""What a LoRA beside a quantized layer costs: within the layer's product, and after it.

Run on a GPU: `python -m tests.bench.bench_lora [--rank 64]`. Quantization of the activation is
included everywhere. Prints a table and appends it to docs/results/lora.jsonl.
"""

import argparse
from collections.abc import Callable, Iterator

import torch

from lowbit.ops.linear import (
    LowRank,
    add_low_rank,
    linear,
    release,
    scaled,
    share,
)
from lowbit.quant import families, formats
from tests.bench import runner

NAMES = ("int8_convrot", "fp8_e4m3")
# The format of the first matrix beside each: one with a scale per row.
BESIDE = {"fp8_e4m3": "fp8_e4m3_rowwise"}
MODELS = (("wan", "14B"), ("qwen_image", "20B"))
READERS = 3
CHECKED_ROWS = 256
# Refuse to time anything that errs more: twice FP8's error.
MAX_ERROR = 0.08


def shapes() -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, M, N, K) of the layers of real models."""
    for family, size in MODELS:
        for layer in families.get(family).shapes[size]:
            yield f"{family} {size} {layer.name}", layer.tokens[0], layer.N, layer.K


def make(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).bfloat16()


def readers(run: Callable, x: torch.Tensor, key: object | None) -> torch.Tensor:
    """Run a layer for each reader of x, announced, and return the last one's result.

    run: (key, rows of the reader) -> result.
    """
    for i in range(READERS):
        share(x, READERS)
        out = run(key, i)
        release(x)
    return out


def ways(x, weight, name: str, rank: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return each way to run a layer, alone and as one of three that read x."""
    (n, k), fmt, beside = weight.shape, formats.get(name), formats.get(BESIDE.get(name, name))
    packed, key = fmt.quantize(weight), object()
    down = make(READERS * rank, k, seed=2, scale=k**-0.5)
    up = make(n, rank, seed=3, scale=0.02 * (k / rank) ** 0.5)
    factor = torch.full((READERS * rank,), 0.8, device="cuda")
    shift = torch.zeros_like(factor)
    # Alone, a layer has a matrix of its own.
    alone, small = down[:rank].contiguous(), factor[:rank]
    # As the nodes have them: the strength is in the scales.
    in_8_bits, all_in_8_bits = scaled(beside.quantize(alone), small), beside.quantize(down)
    all_in_8_bits = scaled(all_in_8_bits, factor)
    in_16_bits = LowRank(alone, up, small, shift[:rank])

    def alone_with(term, backend="auto"):
        return lambda: linear(x, packed, backend=backend, low_rank=term)

    def shared(key, i):
        rows = (i * rank, (i + 1) * rank)
        return linear(x, packed, low_rank=LowRank(all_in_8_bits, up, None, shift, rows, key))

    return {
        "without": alone_with(None),
        "in the product": alone_with(LowRank(in_8_bits, up, None, shift[:rank])),
        "in the product, A in 16 bits": alone_with(in_16_bits),
        "without, triton": alone_with(None, "triton"),
        "in the product, triton": alone_with(LowRank(in_8_bits, up, None, shift[:rank]), "triton"),
        "after it": lambda: add_low_rank(linear(x, packed), x, in_16_bits),
        "three without": lambda: readers(lambda *_: linear(x, packed), x, None),
        "three in the product": lambda: readers(shared, x, key),
    }


def base_of(way: str) -> str:
    """Return the way without a term that a way is compared with."""
    if way.startswith("three"):
        return "three without"
    return "without, triton" if way.endswith("triton") else "without"


def bench(m: int, n: int, k: int, name: str, rank: int) -> dict[str, dict]:
    """Return times and error, by way, of a layer [n, k] with m tokens."""
    x, weight = make(m, k, seed=0), make(n, k, seed=1, scale=0.02)
    runs = ways(x, weight, name, rank)
    errors = {}
    down = make(READERS * rank, k, seed=2, scale=k**-0.5)
    up = make(n, rank, seed=3, scale=0.02 * (k / rank) ** 0.5)
    rows = x[:CHECKED_ROWS].double()
    base = rows @ weight.double().t()
    for way, run in runs.items():
        which = slice(0, 0) if "without" in way else slice((READERS - 1) * rank, None)
        which = which if way.startswith("three") or "without" in way else slice(0, rank)
        part = 0.8 * (rows @ down[which].double().t())
        want = base if "without" in way else base + part @ up.double().t()
        errors[way] = runner.relative_error(run()[:CHECKED_ROWS], want)
        # Not `>`, which NaN would pass.
        if not errors[way] <= MAX_ERROR:
            raise RuntimeError(f"{way} errs by {errors[way]:.3f} at {m}x{n}x{k}: not timed")
    timings = runner.measure(runs)
    return {way: {**vars(t), "error": errors[way]} for way, t in timings.items()}


@torch.inference_mode()
def main() -> None:
    """Time every shape and format, print the table, append the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, nargs="+", default=[64])
    for rank in parser.parse_args().rank:
        for layer, m, n, k in shapes():
            for name in NAMES:
                results = bench(m, n, k, name, rank)
                ms = {way: result["median_ms"] for way, result in results.items()}
                costs = ", ".join(
                    f"{way} {value / ms[base_of(way)] - 1:+.1%}"
                    for way, value in ms.items()
                    if "without" not in way
                )
                print(f"{layer} {m} x {n} x {k} {name} rank {rank}: {costs}", flush=True)
                record = {"layer": layer, "M": m, "N": n, "K": k, "format": name, "rank": rank}
                runner.append("lora", {**record, "results": results})


if __name__ == "__main__":
    main()
