"""`attention`: its contract, on the CPU through the reference, and which backends fit what."""

import pytest
import torch
import torch.nn.functional as F

from lowbit.ops import registry
from lowbit.ops.attention import CAUSAL, KEYS, MASKED, OP, attention, hopper, kind_of, scheme
from lowbit.ops.attention.modes import MODES
from lowbit.ops.attention.triton import TABLE, choose

DTYPES = (torch.bfloat16, torch.float16)


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(b=1, h=2, kv=2, length=9, keys=11, d=16, dtype=torch.float16):
    shapes = ((b, h, length, d), (b, kv, keys, d), (b, kv, keys, d))
    return [make(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def sdpa(q, k, v, **options) -> torch.Tensor:
    """torch's attention in float64."""
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=q.shape[1] != k.shape[1], **options
    )


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal up to the rounding of the result."""
    assert torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [{}, {"h": 4, "kv": 2}, {"b": 3, "length": 1, "keys": 1}, {"length": 63, "d": 96}],
    ids=str,
)
def test_reference_is_exact_in_every_mode(mode, dtype, shape):
    q, k, v = inputs(**shape, dtype=dtype)
    close(attention(q, k, v, mode), sdpa(q, k, v))


def test_scale_mask_and_causal_are_those_of_torch():
    q, k, v = inputs(length=11)
    close(attention(q, k, v, scale=0.5), sdpa(q, k, v, scale=0.5))
    close(attention(q, k, v, causal=True), sdpa(q, k, v, is_causal=True))
    hides = make(1, 1, 11, 11) > -0.5
    close(attention(q, k, v, mask=hides), sdpa(q, k, v, attn_mask=hides))
    added = make(11, seed=3)
    want = sdpa(q, k, v, attn_mask=added.double().expand(11, 11))
    close(attention(q, k, v, mask=added), want)


def test_row_that_no_key_counts_for_gives_zeros():
    q, k, v = inputs()
    hides = torch.ones(9, 11, dtype=torch.bool)
    hides[4] = False
    out, lse = attention(q, k, v, mask=hides, return_lse=True)
    assert (out[:, :, 4] == 0).all() and (lse[:, :, 4] == -torch.inf).all()
    assert torch.isfinite(lse[:, :, 5]).all()


def test_log_sum_exp_joins_halves_of_the_keys():
    q, k, v = inputs(keys=12)
    parts = [
        attention(q, k[:, :, half], v[:, :, half], return_lse=True)
        for half in (slice(0, 5), slice(5, 12))
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
    joined = sum(w * out.float() for w, (out, _) in zip(weights, parts, strict=True))
    assert (joined - sdpa(q, k, v)).norm() <= 2 * torch.finfo(q.dtype).eps * joined.norm()


def test_result_lies_in_memory_as_q_does():
    q, k, v = inputs(h=4, kv=4)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    want, got = attention(q, k, v), attention(*moved)
    assert torch.equal(got, want)
    assert want.is_contiguous() and got.transpose(1, 2).is_contiguous()


def test_inputs_are_not_written_to():
    q, k, v = inputs()
    before = [x.clone() for x in (q, k, v)]
    attention(q, k, v, causal=True)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("empty", ["b", "length", "keys"])
def test_nothing_to_do_is_done(empty):
    q, k, v = inputs(**{empty: 0})
    out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mode": "fp4"}, ValueError, "unknown mode 'fp4'"),
        ({"q": make(2, 9, 16)}, ValueError, r"q is \[2, 9, 16\]"),
        ({"q": make(1, 2, 9, 16).float()}, TypeError, "cast it to bfloat16"),
        ({"k": make(1, 2, 11, 16).bfloat16()}, ValueError, "bring all to one dtype"),
        ({"k": make(1, 2, 11, 8)}, ValueError, "k and v must be"),
        ({"q": make(1, 3, 9, 16)}, ValueError, "3 heads of q do not divide among 2"),
        ({"mask": torch.ones(5, 11, dtype=torch.bool)}, ValueError, "does not broadcast"),
        ({"mask": torch.ones(9, 11, dtype=torch.int32)}, TypeError, "bool or a float dtype"),
        ({"scale": -1.0}, ValueError, "must be positive"),
        ({"backend": "none"}, ValueError, "unknown backend 'none'; known are auto, hopper"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_what_does_not_fit_is_refused(change, error, text):
    q, k, v = inputs()
    with pytest.raises(error, match=text):
        attention(**{"q": q, "k": k, "v": v, **change})


def test_named_backend_that_cannot_run_says_why():
    q, k, v = inputs()
    with pytest.raises(registry.NoBackendError, match="needs a device of"):
        attention(q, k, v, backend="hopper")


@pytest.mark.parametrize(
    ("d", "kind", "reason"),
    [
        (64, None, "not a multiple of 128"),
        (256, KEYS, "above 128"),
        (128, MASKED, "does not know"),
    ],
)
def test_hopper_kernel_says_what_it_does_not_do(d, kind, reason, monkeypatch):
    monkeypatch.setattr(registry, "capability", lambda device: (9, 0))
    call = registry.Call(scheme("exact", kind), torch.device("cuda"), 0, d)
    assert reason in registry.unmet(hopper.NEEDS, call)


def test_kinds_of_masks():
    assert kind_of(None, False) is None and kind_of(None, True) == CAUSAL
    for mask in (make(11), make(1, 11), make(2, 1, 1, 11)):
        assert kind_of(mask, False) == KEYS and kind_of(mask, True) == MASKED
    assert kind_of(make(9, 11), False) == MASKED


@pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
@pytest.mark.parametrize("masked", [True, False])
def test_every_head_size_has_a_cut(mode, masked):
    for has in (*TABLE, (8, 9), (12, 0)):
        for width in (64, 128, 256):
            cut = choose(has, width, mode, masked)
            # Sums of V's numbers are of tiles of 128 keys.
            assert mode.name != "int8" or cut.n == 128


def test_operations_are_known_to_the_compiler():
    """Shapes and strides without running: what torch.compile asks for."""
    q, k, v = (x.to("meta").transpose(1, 2).contiguous().transpose(1, 2) for x in inputs())
    out, lse = attention(q, k, v, return_lse=True)
    assert (out.shape, out.stride(), lse.shape) == (q.shape, q.stride(), q.shape[:3])


def test_compiled_attention_is_one_graph():
    q, k, v = inputs()
    compiled = torch.compile(
        lambda q, k, v: attention(q * 2, k, v) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), attention(q * 2, k, v) + 1)


def test_modes_are_distinct():
    assert len({mode.code for mode in MODES.values()}) == len(MODES)
    assert OP == "attention"
