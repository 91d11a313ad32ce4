"""Norm and rotary embedding of Q and K, then attention: step by step, or as one.

Run on a GPU: `python -m tests.bench.bench_attention_prologue`. Step by step is the order of
ComfyUI: torch's RMS norm, comfy-kitchen's rotary embedding, attention. Prints a table and appends
it to docs/results/attention_prologue.jsonl.
"""

from collections.abc import Callable, Iterator

import comfy_kitchen
import torch
import torch.nn.functional as F

from lowbit.ops.attention import Prologue, attention, reference
from lowbit.ops.attention.hopper import GROUPS
from lowbit.ops.attention.modes import MODES
from lowbit.ops.attention.prepare import inverse_rms, prepare
from tests.bench import attention_data, runner
from tests.bench.attention_data import D, normal

EPS = 1e-6
CHECKED_ROWS = 48
MAX_ERROR = 0.03
# Model, what its norm spans, heads, tokens.
SHAPES = (
    ("qwen_image 20B 1328", "head", 24, 7145),
    ("wan 14B 480p", "token", 40, 32760),
)


def shapes() -> Iterator[tuple[str, str, int, int]]:
    """Yield (model, span of the norm, heads, tokens)."""
    yield from SHAPES


def steps(norm: str, heads: int, tokens: int) -> tuple[Prologue, torch.Tensor]:
    """Return the prologue, and its angles as the host has them, [1, 1, L, 64, 2, 2]."""
    angle = 3 * normal(tokens, D // 2, seed=9, dtype=torch.float32)
    matrix = (angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    freqs = torch.stack(matrix, -1).unflatten(-1, (2, 2))[None, None]
    width = heads * D if norm == "token" else D
    weights = [1 + 0.2 * normal(width, seed=n) for n in (7, 8)]
    return Prologue(norm, EPS, *weights, cos=angle.cos(), sin=angle.sin()), freqs


def separate(x: torch.Tensor, weight: torch.Tensor, norm: str, freqs: torch.Tensor) -> torch.Tensor:
    """Return x [1, H, L, D] after its norm and rotary embedding, rounded after each."""
    rows = x.transpose(1, 2)
    if norm == "token":
        x = F.rms_norm(rows.flatten(2), weight.shape, weight, EPS).view_as(rows)
        return comfy_kitchen.apply_rope1(x, freqs.transpose(1, 2)).transpose(1, 2)
    return comfy_kitchen.apply_rope1(F.rms_norm(x, weight.shape, weight, EPS), freqs)


def runs(q, k, v, p: Prologue, freqs: torch.Tensor) -> Iterator[tuple[str, Callable]]:
    """Yield (name, function) of each way to run all, checked before it is timed."""

    def one_by_one() -> torch.Tensor:
        apart = (separate(x, w, p.norm, freqs) for x, w in ((q, p.q_weight), (k, p.k_weight)))
        return attention(*apart, v)

    yield "separate", one_by_one
    yield "fused", lambda: attention(q, k, v, prologue=p)
    yield "fused, rotated", lambda: attention(q, k, v, prologue=p, rotate=True)


def parts(q, k, v, p: Prologue, freqs: torch.Tensor) -> Iterator[tuple[str, Callable]]:
    """Yield (name, function) of what the above consists of."""
    given = (q, k, v, 0.1, MODES["exact"], GROUPS, True, False)
    yield "norm and rope of q", lambda: separate(q, p.q_weight, p.norm, freqs)
    yield "attention", lambda: attention(q, k, v)
    yield "attention, rotated", lambda: attention(q, k, v, rotate=True)
    yield "quantizers", lambda: prepare(*given)
    yield "quantizers, rotated", lambda: prepare(*given, rotate=True)
    yield "quantizers, fused", lambda: prepare(*given, p)
    yield "quantizers, fused, rotated", lambda: prepare(*given, p, True)
    yield "inverse rms of q", lambda: inverse_rms(q, EPS)


def bench(norm: str, heads: int, tokens: int) -> dict[str, dict]:
    """Return, by name, times, and errors of what has one."""
    q, k, v = attention_data.make("normal", heads, tokens, tokens)
    p, freqs = steps(norm, heads, tokens)
    rows = slice(0, tokens, tokens // CHECKED_ROWS)
    exact = [reference.prepared(x, w, p) for x, w in ((q, p.q_weight), (k, p.k_weight))]
    want = attention_data.exact(*exact, v, rows)
    del exact
    ways = dict(runs(q, k, v, p, freqs))
    errors = {name: runner.relative_error(run()[:, :, rows], want) for name, run in ways.items()}
    for name, error in errors.items():
        # Not `>`, which NaN would pass.
        if not error <= MAX_ERROR:
            raise RuntimeError(f"{name} errs by {error:.3f} at {heads} x {tokens}: not timed")
    timings = runner.measure({**ways, **dict(parts(q, k, v, p, freqs))})
    return {name: {**vars(t), "error": errors.get(name)} for name, t in timings.items()}


@torch.inference_mode()
def main() -> None:
    """Time every shape, print the table, append the results."""
    for model, norm, heads, tokens in shapes():
        results = bench(norm, heads, tokens)
        print(f"{model}: {heads} x {tokens}, norm of a {norm}")
        for name, result in results.items():
            error = "" if result["error"] is None else f"error {result['error']:.4f}"
            print(f"  {name:28} {result['median_ms']:8.3f} ms {error}", flush=True)
        record = {"model": model, "norm": norm, "heads": heads, "tokens": tokens}
        runner.append("attention_prologue", {**record, "results": results})


if __name__ == "__main__":
    main()
