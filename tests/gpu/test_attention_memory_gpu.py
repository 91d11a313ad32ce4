"""What attention takes of a GPU's memory beside its result: 8-bit copies, and little more."""

import pytest
import torch

from lowbit.ops.attention import Prologue, attention, hopper, prepare, prepass
from lowbit.ops.attention.modes import MODES

D, FLOAT = 128, 4
# What sizes are rounded up to, for some 20 tensors, and what is of each head.
ROUNDED_BYTES = 1 << 18


def taken(run) -> int:
    """Bytes that are asked for at most, beyond those before, by a call like one before."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    result = run()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    del result
    return peak - before


def expected(h: int, kv: int, queries: int, keys: int, mode: str, norm: bool, lse: bool):
    """Bytes of the copies, of their scales and bounds, and of what is there for a while."""
    tiles, blocks = prepare.count(queries), prepare.count(keys)
    stored = MODES[mode].storage is not None
    copies = (h * tiles + kv * blocks * (1 + stored)) * prepare.TILE * D
    rows = h * tiles * prepare.TILE
    scales = FLOAT * (2 * rows + kv * blocks * 5 + stored * kv * 2 * D + lse * h * queries)
    # Of the sample: means of K and V, FP8's largest and least of V; of all: what V's rounding took.
    of_sample = prepass.count(min(keys, prepass.SAMPLE), prepass.SURVEY_TOKENS) * kv * D
    several = 1 + stored + 2 * (mode == "fp8")
    sums = FLOAT * (several * of_sample + stored * kv * blocks * D)
    if norm:
        sums += FLOAT * (prepass.count(h, prepass.Q_HEADS) * tiles * prepare.TILE + keys)
    kind = hopper.Kind(MODES[mode], torch.bfloat16, long=keys >= hopper.LONG_KEYS)
    cluster = kind.variant["CLUSTER"]
    units = prepass.count(tiles, cluster) * h
    at_once = torch.cuda.get_device_properties(0).multi_processor_count // cluster
    whole, parts = hopper.split(units, blocks, at_once)
    shared = FLOAT * (units - whole) * cluster * parts * hopper.PARTIAL
    return copies, scales, max(sums, shared)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    ("h", "kv", "queries", "keys", "norm", "lse"),
    [
        (24, 24, 7145, 7145, False, False),
        (40, 40, 32760, 32760, True, False),
        (40, 40, 32760, 32760, False, False),
        (8, 2, 5000, 9000, False, True),
        (1, 1, 128, 20000, False, False),
        (24, 24, 4096, 512, False, False),
    ],
)
def test_attention_takes_its_copies_and_little_more(h, kv, queries, keys, norm, lse, mode):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("counted as Hopper's kernel needs it")
    q, k, v = (
        torch.randn(1, length, heads, D, device="cuda").bfloat16().transpose(1, 2)
        for length, heads in ((queries, h), (keys, kv), (keys, kv))
    )
    prologue = Prologue()
    if norm:
        # Two: a call with one tensor in two places is prepared each time.
        weights = torch.ones(2, h * D, device="cuda", dtype=torch.bfloat16).unbind()
        prologue = Prologue("token", 1e-6, *weights)
    got = taken(lambda: attention(q, k, v, mode, return_lse=lse, prologue=prologue))
    result = q.numel() * q.element_size() + lse * h * queries * FLOAT
    copies, scales, passing = expected(h, kv, queries, keys, mode, norm, lse)
    extra = got - result
    assert copies < extra <= copies + scales + passing + ROUNDED_BYTES
    # Of what people run, no more than this.
    if h * queries >= 24 * 7145:
        assert scales <= 0.04 * copies and passing <= 0.2 * copies
