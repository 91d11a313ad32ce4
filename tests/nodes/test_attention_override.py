"""The override of ComfyUI's attention, called as the host calls it, without the host."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from lowbit.nodes import attention_override
from lowbit.nodes.attention_override import LAYERS, Override, parse_blocks
from lowbit.ops.attention import router

HEADS, D, TEXT = 2, 64, 7
EPS = torch.finfo(torch.bfloat16).eps


class Sampling:
    """A flow's order of noise: sigma is what is left of the sampling."""

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


def options_of(override: Override, sigma: float = 1.0, text: int | None = TEXT, **given) -> dict:
    """What the host's blocks find among the options, once the wrapper has run."""

    class Executor:
        class_obj = type("Model", (), {"model_sampling": Sampling()})

        def __call__(self, x, t, concat, context, control, options, **kwargs):
            return options

    context = None if text is None else torch.zeros(1, text, 3)
    options = {"sigmas": torch.tensor([sigma]), **given}
    return override.forward(Executor(), None, None, None, context, None, options)


class Host:
    """The host's own attention: counts its calls and remembers how the last one came."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return "the host's"


def flat(length: int = 9, keys: int = 9, dtype: torch.dtype = torch.bfloat16, kv: int = HEADS):
    """q, k, v [B, L, H·D], as Wan gives them."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((length, HEADS), (keys, kv), (keys, kv))
    return [torch.randn(2, n, h * D, generator=generator).to(dtype) for n, h in sizes]


def split(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (-1, D)).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= EPS * want.norm()


def want(q, k, v, **options) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)


@pytest.fixture
def host():
    return Host()


def call(override: Override, host, q, k, v, *args, sigma=1.0, text=TEXT, given=None, **kwargs):
    options = options_of(override, sigma, text, **(given or {}))
    kwargs = {"transformer_options": options, "_inside_attn_wrapper": True, **kwargs}
    return override(host, q, k, v, *args, **kwargs)


def test_flat_inputs_with_heads_by_name_give_flat_results(host):
    q, k, v = flat()
    got = call(Override("lowbit_exact"), host, q, k, v, heads=HEADS)
    close(got, joined(want(*map(split, (q, k, v)))))
    assert not host.calls


def test_split_inputs_with_heads_and_mask_by_place_give_flat_results(host):
    q, k, v = map(split, flat())
    mask = torch.zeros(2, 1, 9, dtype=q.dtype)
    mask[:, :, -2:] = -torch.inf
    got = call(Override("lowbit_exact"), host, q, k, v, HEADS, mask, skip_reshape=True)
    close(got, joined(want(q, k, v, attn_mask=mask[:, None].double())))


def test_results_stay_split_when_the_host_says_so(host):
    q, k, v = map(split, flat())
    options = {"skip_reshape": True, "skip_output_reshape": True}
    got = call(Override("lowbit_exact"), host, q, k, v, HEADS, **options)
    close(got, want(q, k, v))


def test_scale_and_grouped_heads_are_honoured(host):
    q, k, v = flat(kv=1)
    got = call(Override("lowbit_exact"), host, q, k, v, HEADS, enable_gqa=True, scale=0.5)
    close(got, joined(want(*map(split, (q, k, v)), enable_gqa=True, scale=0.5)))


def test_two_dimensions_of_a_mask_are_queries_and_keys(host):
    q, k, v = flat()
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    got = call(Override("lowbit_exact"), host, q, k, v, HEADS, mask)
    close(got, joined(want(*map(split, (q, k, v)), attn_mask=mask)))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"low_precision_attention": False},
        {"attn_precision": torch.float32},
        {"unheard_of": 1},
        {"heads": 4, "skip_reshape": True},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_is_the_hosts_alone_goes_to_it_as_it_came(host, kwargs):
    q, k, v = map(split, flat()) if "skip_reshape" in kwargs else flat()
    kwargs = {"heads": HEADS, **kwargs}
    assert call(Override("lowbit_exact"), host, q, k, v, **kwargs) == "the host's"
    ((args, given),) = host.calls
    assert all(x is y for x, y in zip(args, (q, k, v), strict=True))
    assert given.items() >= kwargs.items() and given["_inside_attn_wrapper"] is True


def test_call_that_the_mode_cannot_run_goes_to_the_host_and_is_told_once(host, caplog):
    override = Override("lowbit_exact")
    for _ in range(2):
        got = call(override, host, *flat(dtype=torch.float64), heads=HEADS)
        assert got == "the host's"
    (record,) = caplog.records
    assert (
        "left to the attention that was there: lowbit_exact: does not know float64"
        in record.message
    )


def test_auto_leaves_a_cpu_to_the_host(host):
    assert call(Override("auto"), host, *flat(), heads=HEADS) == "the host's"


@pytest.mark.parametrize(
    ("length", "keys", "text", "meant"),
    [
        (9, 9, TEXT, {"self", "all"}),
        (9, TEXT, TEXT, {"cross", "all"}),
        # As many tokens as the text has: it may be either.
        (TEXT, TEXT, TEXT, {"all"}),
        (9, 9, None, {"self", "all"}),
    ],
)
def test_layers_are_told_apart_by_their_lengths(host, length, keys, text, meant):
    q, k, v = flat(length, keys)
    ran = {
        layers
        for layers in LAYERS
        if torch.is_tensor(call(Override("sdpa", layers), host, q, k, v, heads=HEADS, text=text))
    }
    assert ran == meant


@pytest.mark.parametrize(
    ("steps", "meant"),
    [
        ((0.0, 1.0), {1.0, 0.75, 0.5, 0.25, 0.1}),
        ((0.0, 0.0), set()),
        ((0.5, 0.5), set()),
        ((0.25, 0.75), {0.75, 0.5}),
        ((0.5, 1.0), {0.5, 0.25, 0.1}),
        ((0.0, 0.5), {1.0, 0.75}),
    ],
)
def test_steps_begin_with_the_first_and_end_before_the_last(host, steps, meant):
    override = Override("sdpa", steps=steps)
    ran = {
        sigma
        for sigma in (1.0, 0.75, 0.5, 0.25, 0.1)
        if torch.is_tensor(call(override, host, *flat(), heads=HEADS, sigma=sigma))
    }
    assert ran == meant


def test_blocks_are_counted_by_the_hosts_index(host):
    override = Override("sdpa", blocks="1-2, 5, 8-")
    ran = [
        index
        for index in range(11)
        if torch.is_tensor(call(override, host, *flat(), heads=HEADS, given={"block_index": index}))
    ]
    assert ran == [1, 2, 5, 8, 9, 10]
    assert call(override, host, *flat(), heads=HEADS) == "the host's"


def test_call_outside_a_run_of_the_model_is_the_hosts(host):
    assert Override("sdpa")(host, *flat(), heads=HEADS) == "the host's"


def test_what_one_override_leaves_the_one_before_it_gets(host):
    first = Override("sdpa", "all")
    second = Override("lowbit_exact", blocks="0", previous=first)
    q, k, v = flat()
    options = options_of(second, **options_of(first), block_index=1)
    got = second(host, q, k, v, HEADS, transformer_options=options)
    assert torch.equal(got, joined(F.scaled_dot_product_attention(*map(split, (q, k, v)))))
    assert not host.calls


@pytest.mark.parametrize("guard", [True, False])
def test_guard_replaces_what_is_not_finite_and_says_so_once(host, monkeypatch, caplog, guard):
    def broken(q, k, v, mode, **options):
        out = router.route(q, k, v, "sdpa", **options)
        return out if mode == "sdpa" else out.index_fill(2, torch.tensor([3]), torch.nan)

    shim = type("Router", (), {**vars(router), "route": staticmethod(broken)})
    monkeypatch.setattr(attention_override, "router", shim)
    override = Override("lowbit_exact", guard=guard)
    q, k, v = flat()
    for _ in range(2):
        got = call(override, host, q, k, v, heads=HEADS)
        assert got.isfinite().all() == guard
    assert len(caplog.records) == guard
    assert not guard or "lowbit_exact gave NaN or infinity" in caplog.records[0].message


@pytest.mark.parametrize("mode", ["sdpa", "lowbit_exact"])
def test_compiled_override_is_one_graph(host, mode):
    override = Override(mode)
    options = options_of(override)
    run = functools.partial(override, host, heads=HEADS, transformer_options=options)
    q, k, v = flat()
    compiled = torch.compile(lambda q: run(q, k, v) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), run(q, k, v) + 1)


def test_another_step_compiles_nothing_anew(host):
    override, counter = Override("sdpa"), CompileCounter()
    q, k, v = flat()
    compiled = torch.compile(
        lambda q, options: override(host, q, k, v, heads=HEADS, transformer_options=options),
        fullgraph=True,
        backend=counter,
    )
    for sigma in (1.0, 0.75, 0.5):
        compiled(q, options_of(override, sigma))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("text", "ranges"),
    [("", None), (" ", None), ("3", [(3, 3)]), ("0-2, 7 - 9", [(0, 2), (7, 9)])],
)
def test_blocks_are_read(text, ranges):
    got = parse_blocks(text)
    assert got == (ranges and tuple(range(a, b + 1) for a, b in ranges))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"blocks": "first"}, "'first' is neither a block nor a range"),
        ({"blocks": "1,"}, "'' is neither"),
        ({"blocks": "-3"}, "'-3' is neither"),
        ({"blocks": "5-3"}, "5-3 ends before it starts"),
        ({"steps": (0.6, 0.5)}, r"steps from 0\.6 to 0\.5"),
        ({"layers": "image"}, "unknown layers 'image'; known are self, cross, all"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Override("auto", **given)
