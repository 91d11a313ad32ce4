"""Attention of real models: ours in each mode, and what else can be installed, side by side.

Run on a GPU: `python -m tests.bench.bench_attention`, with `--short` for short sequences and texts,
where quantizing weighs more, `--masked`, where a text before an image has padding, or
`--sustained`, each by itself at the clock that its power allows instead of in turn. Quantization of
Q, K and V is included everywhere. SageAttention, which its users compile, takes part if it is
installed. Prints a table and appends it to docs/results/attention.jsonl, attention_short.jsonl,
attention_masked.jsonl or attention_sustained.jsonl.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit.ops.attention import attention
from lowbit.ops.attention.modes import MODES
from tests.bench import attention_data, runner
from tests.bench.attention_data import D


@dataclass(frozen=True)
class Shape:
    """An attention of `heads` heads of 128 channels, `queries` by `keys`."""

    model: str
    heads: int
    queries: int
    keys: int


# Video of 81 frames at 480p and at 720p; an image of 1328² with its text.
LONG = (
    Shape("qwen_image 20B 1328", 24, 7145, 7145),
    Shape("wan 14B 480p", 40, 32760, 32760),
    Shape("wan 14B 720p", 40, 75600, 75600),
)
# Where quantizing begins to pay; then Wan's text and image, Qwen-Image's text.
SHORT = (
    *(
        Shape("short", heads, tokens, tokens)
        for heads in (24, 40)
        for tokens in (256, 512, 768, 1024, 1536, 2048, 3072, 4096)
    ),
    Shape("wan 14B text", 40, 32760, 512),
    Shape("wan 14B image", 40, 32760, 257),
    Shape("qwen_image 20B text", 24, 7145, 256),
)
# Keys of a text's padding: of 256 tokens, 100 are its own.
PADDING = slice(100, 256)
CHECKED_ROWS = 48
# Refuse to time anything that errs more: the error of FP8 in both operands, and half as much.
MAX_ERROR = 0.06


def shapes() -> Iterator[Shape]:
    """Yield every shape that can be timed."""
    yield from (*LONG, *SHORT)


def runs(q, k, v, mask: torch.Tensor | None = None) -> Iterator[tuple[str, Callable]]:
    """Yield (name, function) of each way to run q, k, v [1, H, L, D], and a mask [Lk]."""

    def sdpa(kind: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    if mask is not None:
        mask = mask[None, None, None]
    yield "cudnn", lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
    if mask is None:
        yield "flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION)
    if importlib.util.find_spec("comfy_kitchen"):
        import comfy_kitchen

        if comfy_kitchen.int8_attention_is_available():
            yield "kitchen", lambda: comfy_kitchen.int8_attention(q, k, v, attn_mask=mask)
    if mask is None and importlib.util.find_spec("sageattention"):
        import sageattention

        yield "sageattn", lambda: sageattention.sageattn(q, k, v, tensor_layout="HND")
    for mode in MODES:
        for backend in ("hopper", "triton"):
            way = {"mode": mode, "backend": backend, "mask": mask}
            yield f"{backend} {mode}", lambda way=way: attention(q, k, v, **way)


def bench(
    shape: Shape,
    skip: tuple[str, ...] = (),
    masked: bool = False,
    measure: Callable[..., dict[str, runner.Timing]] = runner.measure,
) -> dict[str, dict]:
    """Return times, error and rate by name of the way to run it, but of names that start so."""
    q, k, v = attention_data.make("normal", shape.heads, shape.queries, shape.keys)
    rows = slice(0, shape.queries, max(shape.queries // CHECKED_ROWS, 1))
    mask = None
    if masked:
        mask = torch.ones(shape.keys, dtype=torch.bool, device="cuda")
        mask[PADDING] = False
    want = attention_data.exact(q, k, v, rows, mask)
    ways = {name: run for name, run in runs(q, k, v, mask) if not name.startswith(skip)}
    errors = {}
    for name, run in ways.items():
        errors[name] = runner.relative_error(run()[:, :, rows], want)
        # Not `>`, which NaN would pass.
        if not errors[name] <= MAX_ERROR:
            raise RuntimeError(f"{name} errs by {errors[name]:.3f} at {shape}: not timed")
    operations = 4 * shape.heads * shape.queries * shape.keys * D
    return {
        name: {
            **vars(timing),
            "error": errors[name],
            "tflops": operations / timing.median_ms / 1e9,
        }
        for name, timing in measure(ways).items()
    }


def line(shape: Shape, results: dict[str, dict]) -> str:
    """Return the table's line: each way's rate, error and ratio to cuDNN."""
    base = results["cudnn"]["median_ms"]
    cells = [f"{shape.model} {shape.heads} x {shape.queries} x {shape.keys}"]
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
    parser.add_argument("--only", default="", help="only shapes whose model holds this")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--short", action="store_true", help="short sequences, and texts")
    other.add_argument("--masked", action="store_true", help="with a mask of keys")
    other.add_argument("--sustained", action="store_true", help="each by itself, not in turn")
    given = parser.parse_args()
    kind = next((f"_{k}" for k in ("short", "masked", "sustained") if getattr(given, k)), "")
    for shape in SHORT if given.short else LONG:
        if given.only in shape.model:
            # What is slower than cuDNN at length is left out there.
            skip = ("triton", "kitchen", "flash") if given.short or given.sustained else ()
            measure = runner.measure_sustained if given.sustained else runner.measure
            results = bench(shape, skip, given.masked, measure)
            print(line(shape, results), flush=True)
            record = {**vars(shape), "head_size": D, "results": results}
            runner.append(f"attention{kind}", record)


if __name__ == "__main__":
    main()
