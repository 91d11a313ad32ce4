"""Attention of real models: ours in each mode, and what else can be installed, side by side.

Run on a GPU: `python -m tests.bench.bench_attention`. Quantization of Q, K and V is included
everywhere. Prints a table and appends it to docs/results/attention.jsonl.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit.ops.attention import attention
from lowbit.ops.attention.modes import MODES
from tests.bench import runner

D = 128
# Model, heads, tokens: video of 81 frames at 480p and at 720p; an image of 1328² with its text.
SHAPES = (
    ("qwen_image 20B 1328", 24, 7145),
    ("wan 14B 480p", 40, 32760),
    ("wan 14B 720p", 40, 75600),
)
CHECKED_ROWS = 48
# Refuse to time anything that errs more: the error of FP8 in both operands, and half as much.
MAX_ERROR = 0.06


def shapes() -> Iterator[tuple[str, int, int]]:
    """Yield (name, heads, tokens) of self-attention in real models."""
    yield from SHAPES


def runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Callable]]:
    """Yield (name, function) of each way to run q, k, v [1, H, L, D]."""

    def sdpa(kind: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    yield "cudnn", lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
    yield "flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION)
    if importlib.util.find_spec("comfy_kitchen"):
        import comfy_kitchen

        if comfy_kitchen.int8_attention_is_available():
            yield "kitchen", lambda: comfy_kitchen.int8_attention(q, k, v)
    if importlib.util.find_spec("sageattention"):
        import sageattention

        yield "sageattn", lambda: sageattention.sageattn(q, k, v, tensor_layout="HND")
    for mode in MODES:
        yield f"hopper {mode}", lambda m=mode: attention(q, k, v, m, backend="hopper")
        yield f"triton {mode}", lambda m=mode: attention(q, k, v, m, backend="triton")


def make(heads: int, tokens: int) -> list[torch.Tensor]:
    """Return q, k, v [1, H, L, D] that lie as [1, L, H, D], as projections give them."""
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(1, tokens, heads, D, generator=generator, device="cuda")
        .bfloat16()
        .transpose(1, 2)
        for _ in range(3)
    ]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return the attention of some rows in float64, a head at a time."""
    heads = []
    for h in range(q.shape[1]):
        logits = q[0, h, rows].double() @ k[0, h].double().t() * D**-0.5
        heads.append(logits.softmax(1) @ v[0, h].double())
    return torch.stack(heads)[None]


def bench(heads: int, tokens: int) -> dict[str, dict]:
    """Return, by name of the way to run it, times, error and rate."""
    q, k, v = make(heads, tokens)
    rows = slice(0, tokens, tokens // CHECKED_ROWS)
    want = exact(q, k, v, rows)
    ways = dict(runs(q, k, v))
    errors = {}
    for name, run in ways.items():
        errors[name] = runner.relative_error(run()[:, :, rows], want)
        # Not `>`, which NaN would pass.
        if not errors[name] <= MAX_ERROR:
            raise RuntimeError(f"{name} errs by {errors[name]:.3f} at {heads}x{tokens}: not timed")
    operations = 4 * heads * tokens**2 * D
    return {
        name: {
            **vars(timing),
            "error": errors[name],
            "tflops": operations / timing.median_ms / 1e9,
        }
        for name, timing in runner.measure(ways).items()
    }


def line(name: str, heads: int, tokens: int, results: dict[str, dict]) -> str:
    """Return the table's line: each way's rate, error and ratio to cuDNN."""
    base = results["cudnn"]["median_ms"]
    cells = [f"{name} {heads} x {tokens}"]
    for way, result in results.items():
        cells.append(
            f"{way} {result['median_ms']:.3f} ms, {result['tflops']:.0f}, "
            f"err {result['error']:.4f}, {base / result['median_ms']:.2f}x"
        )
    return "| " + " | ".join(cells) + " |"


@torch.inference_mode()
def main() -> None:
    """Time every shape, print the table, append the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only shapes whose name holds this")
    only = parser.parse_args().only
    for name, heads, tokens in shapes():
        if only in name:
            results = bench(heads, tokens)
            print(line(name, heads, tokens, results), flush=True)
            record = {"model": name, "heads": heads, "tokens": tokens, "head_size": D}
            runner.append("attention", {**record, "results": results})


if __name__ == "__main__":
    main()
