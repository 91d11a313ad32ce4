"""Activation quantizers at the sizes of real models, against a copy of the same bytes.

By the backend that `auto` takes, and by Triton's.

Run on a GPU: `python -m tests.bench.bench_quantize_rows`. Prints a table and appends it to
docs/results/quantize_rows.jsonl.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from lowbit.ops.quantize_rows import Prologue, quantize_rows
from lowbit.ops.quantize_rows import reference as plain
from lowbit.quant import families
from tests.bench import runner

MODELS = (("wan", "14B"), ("wan", "5B"), ("qwen_image", "20B"))
FP8 = torch.float8_e4m3fn
# What a way's name gets after it, and the backend.
BACKENDS = {"": "auto", ", triton": "triton"}
CHECKED_ROWS = 64
# Two roundings to 8 bits of values that lie between two codes.
MAX_ERROR = 0.04


def shapes() -> Iterator[tuple[str, int, int]]:
    """Yield (model, tokens, K) of every activation that layers with many tokens read."""
    seen = set()
    for family, size in MODELS:
        for layer in families.get(family).shapes[size]:
            for tokens in layer.tokens:
                if (tokens, layer.K) not in seen:
                    seen.add((tokens, layer.K))
                    yield f"{family} {size}", tokens, layer.K


def ways(x: torch.Tensor) -> Iterator[tuple[str, torch.dtype, bool, Prologue, Callable]]:
    """Yield (name, dtype, rotated, prologue, what torch does for the prologue)."""
    k = x.shape[1]
    scale, shift = (0.1 * torch.randn(1, k, device=x.device, dtype=x.dtype) for _ in range(2))
    adaln = Prologue("layer", scale=scale, shift=shift)
    gelu = Prologue(activation="gelu_tanh")

    def modulate(x):
        return torch.addcmul(shift, F.layer_norm(x, (k,), eps=adaln.eps), 1 + scale)

    def activate(x):
        return F.gelu(x, approximate="tanh")

    for dtype, rotated, name in (
        (FP8, False, "fp8"),
        (torch.int8, False, "int8"),
        (torch.int8, True, "int8 rotated"),
    ):
        yield name, dtype, rotated, Prologue(), lambda x: x
        yield f"{name}, LayerNorm + modulate", dtype, rotated, adaln, modulate
        yield f"{name}, GELU", dtype, rotated, gelu, activate


def bench(m: int, k: int) -> dict[str, dict]:
    """Return, by way, its times, those of separate steps, and its share of a copy's bandwidth."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(x)
    runs = {"copy": lambda: target.copy_(x)}
    for name, dtype, rotated, prologue, step in ways(x):
        want, unit = plain.run(x[:CHECKED_ROWS], dtype, rotated, prologue)
        for suffix, backend in BACKENDS.items():
            got, scale = quantize_rows(x, dtype, rotated, backend, prologue=prologue)
            value = got[:CHECKED_ROWS].float() * scale[:CHECKED_ROWS]
            error = runner.relative_error(value, want.float() * unit)
            # Not `>`, which NaN would pass.
            if not error <= MAX_ERROR:
                raise RuntimeError(f"{name}{suffix} errs by {error:.3f} at {m}x{k}: not timed")
            runs[f"{name}{suffix}"] = lambda d=dtype, r=rotated, b=backend, p=prologue: (
                quantize_rows(x, d, r, b, prologue=p)
            )
        if prologue != Prologue():
            runs[f"{name}, apart"] = lambda d=dtype, r=rotated, s=step: quantize_rows(s(x), d, r)
    timings = runner.measure(runs)
    copied = 2 * x.nbytes / timings["copy"].median_ms
    return {
        name: {
            **vars(timing),
            "gb_s": (3 * m * k if name != "copy" else 4 * m * k) / timing.median_ms / 1e6,
            "of_copy": (3 * m * k if name != "copy" else 4 * m * k) / timing.median_ms / copied,
        }
        for name, timing in timings.items()
    }


@torch.inference_mode()
def main() -> None:
    """Time every shape, print the table, append the results."""
    for name, m, k in shapes():
        results = bench(m, k)
        print(f"{name} {m} x {k}")
        for way, result in results.items():
            print(
                f"  {way:36} {result['median_ms'] * 1e3:8.1f} us {result['gb_s']:7.0f} GB/s "
                f"{result['of_copy']:6.1%} of copy",
                flush=True,
            )
        runner.append("quantize_rows", {"model": name, "M": m, "K": k, "results": results})


if __name__ == "__main__":
    main()
