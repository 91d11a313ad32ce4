"""Norms and rotary embedding before `attention`: the reference against the order of the host."""

import pytest
import torch
import torch.nn.functional as F

from lowbit.ops.attention import Prologue, attention, guard, reference, router, ways
from lowbit.ops.registry import NoBackendError

EPS = 1e-6
B, H, KV, LENGTH, D = 2, 4, 2, 9, 16


def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs() -> list[torch.Tensor]:
    shapes = ((B, LENGTH, H, D), (B, LENGTH, KV, D), (B, LENGTH, KV, D))
    return [make(*shape, seed=i).transpose(1, 2) for i, shape in enumerate(shapes)]


def angles() -> torch.Tensor:
    """What the host calls freqs, [L, D / 2, 2, 2]."""
    a = make(LENGTH, D // 2, seed=5, dtype=torch.float32) * 3
    return torch.stack((a.cos(), -a.sin(), a.sin(), a.cos()), -1).unflatten(-1, (2, 2))


def tables() -> dict[str, torch.Tensor]:
    freqs = angles()
    return {"cos": freqs[..., 0, 0].contiguous(), "sin": freqs[..., 1, 0].contiguous()}


def turned(x: torch.Tensor) -> torch.Tensor:
    """x [B, H, L, D] by the matrices, as the host turns it."""
    pairs = x.unflatten(-1, (-1, 1, 2))
    freqs = angles().double()
    return (freqs[..., 0] * pairs[..., 0] + freqs[..., 1] * pairs[..., 1]).flatten(-2)


def sdpa(q, k, v) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v.double(), enable_gqa=True).half()


def test_norm_of_a_token_and_rope_are_wans():
    q, k, v = inputs()
    w = {"q": make(H * D, seed=6), "k": make(KV * D, seed=7)}
    want = [
        turned(
            F.rms_norm(x.transpose(1, 2).flatten(2).double(), w[n].shape, w[n].double(), EPS)
            .unflatten(2, (-1, D))
            .transpose(1, 2)
        )
        for n, x in (("q", q), ("k", k))
    ]
    prologue = Prologue("token", EPS, w["q"], w["k"], **tables())
    assert torch.equal(attention(q, k, v, prologue=prologue), sdpa(*want, v))


def test_norm_of_a_head_with_a_texts_own_weight_and_rope_are_qwens():
    q, k, v = inputs()
    w = {"q": make(2, D, seed=6), "k": make(2, D, seed=7)}
    text = 4
    want = [
        turned(
            torch.cat(
                [
                    F.rms_norm(part.double(), (D,), row.double(), EPS)
                    for part, row in zip((x[:, :, :text], x[:, :, text:]), w[n], strict=True)
                ],
                2,
            )
        )
        for n, x in (("q", q), ("k", k))
    ]
    prologue = Prologue("head", EPS, w["q"], w["k"], first=text, **tables())
    assert torch.equal(attention(q, k, v, prologue=prologue), sdpa(*want, v))


def test_rope_alone_and_nothing():
    q, k, v = inputs()
    got = attention(q, k, v, prologue=Prologue(**tables()))
    assert torch.equal(got, sdpa(turned(q.double()), turned(k.double()), v))
    assert torch.equal(attention(q, k, v, prologue=Prologue()), attention(q, k, v))


def test_rotation_changes_nothing_but_rounding():
    q, k, v = inputs()
    assert torch.equal(attention(q, k, v, rotate=True), attention(q, k, v))


def test_attention_with_a_prologue_compiles_to_one_graph():
    q, k, v = inputs()
    prologue = Prologue("head", EPS, make(D), make(D), **tables())

    def run(q, k, v):
        return attention(q * 2, k, v, prologue=prologue, rotate=True) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    ("steps", "error", "text"),
    [
        ({"norm": "layer"}, ValueError, "norm is 'layer'"),
        ({"norm": "token", "q_weight": make(D)}, ValueError, r"q_weight is \[16\]; \[64\] or \[2"),
        ({"norm": "head", "k_weight": make(3, D)}, ValueError, r"k_weight is \[3, 16\]"),
        ({"q_weight": make(D).double()}, TypeError, "float of 16 or 32 bits"),
        ({"q_weight": make(2 * D)[::2]}, ValueError, "not contiguous"),
        ({"cos": make(LENGTH, D // 2)}, ValueError, "come together"),
        ({n: make(LENGTH - 1, D // 2) for n in ("cos", "sin")}, ValueError, r"\[9 or more, 16 /"),
        ({n: make(LENGTH, D) for n in ("cos", "sin")}, ValueError, r"cos is \[9, 16\]"),
        ({"q_weight": make(D).to("meta")}, ValueError, "q_weight is on meta"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_steps_that_do_not_fit_are_refused(steps, error, text):
    with pytest.raises(error, match=text):
        attention(*inputs(), prologue=Prologue(**steps))


def qwens() -> Prologue:
    weights = (make(2, D, seed=6), make(2, D, seed=7))
    return Prologue("head", EPS, *weights, first=5, **tables())


def wans() -> Prologue:
    return Prologue("token", EPS, make(H * D, seed=6), make(KV * D, seed=7), **tables())


@pytest.mark.parametrize("prologue", [qwens(), wans()], ids=["qwen", "wan"])
def test_applied_by_pieces_of_tokens_is_the_whole(prologue, monkeypatch):
    q, k, _ = inputs()
    want = [
        reference.prepared(x, w, prologue).half()
        for x, w in ((q, prologue.q_weight), (k, prologue.k_weight))
    ]
    for chunk in (4, 100):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        for name, x, exact in zip("qk", (q, k), want, strict=True):
            got = reference.applied(prologue, x, prologue.weight(name))
            torch.testing.assert_close(got, exact, rtol=2e-3, atol=1e-4)
            heads, tokens = torch.tensor([1, 0]), torch.tensor([2, 8, 4, 6, 5])
            some = (prologue, x[:, :, tokens], prologue.weight(name), heads, tokens)
            want_some = got[:, heads][:, :, tokens]
            torch.testing.assert_close(reference.applied(*some), want_some, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("prologue", [qwens(), wans()], ids=["qwen", "wan"])
@pytest.mark.parametrize("checked", guard.GUARDS)
def test_router_does_the_prologue_and_proves_it(prologue, checked, caplog):
    q, k, v = inputs()
    guard.forget()
    got = router.route(q, k, v, "lowbit_exact", prologue=prologue, guard=checked)
    assert torch.equal(got, attention(q, k, v, prologue=prologue))
    assert not caplog.records


def test_way_that_forgets_the_prologue_is_found_and_torch_gets_what_it_would_have_done(caplog):
    q, k, v = inputs()
    guard.forget()

    def forgetful(q, k, v, mask, causal, scale, prologue) -> torch.Tensor:
        return ways.sdpa(q, k, v, mask, causal, scale)

    arguments = ("lowbit_exact", forgetful, guard.FIRST_CALL, q, k, v, None, False, None)
    got = guard.run(*arguments, wans())
    steps = [reference.applied(wans(), x, wans().weight(name)) for name, x in (("q", q), ("k", k))]
    assert torch.equal(got, ways.sdpa(*steps, v, None, False, None))
    assert "is wrong" in caplog.text
    guard.forget()


@pytest.mark.parametrize("mode", ["sdpa", "auto"])
def test_way_without_a_prologue_is_refused(mode):
    with pytest.raises(NoBackendError, match="takes no prologue"):
        router.route(*inputs(), mode, prologue=wans())


def test_routed_prologue_compiles_to_one_graph():
    q, k, v = inputs()
    prologue = qwens()

    def run(q, k, v):
        return router.route(q * 2, k, v, "lowbit_exact", prologue=prologue) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), run(q, k, v))
