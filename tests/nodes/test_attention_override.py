"""The override of ComfyUI's attention, called as the host calls it, without the host."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from lowbit.nodes.attention_override import LAYERS, Override, parse_blocks
from lowbit.ops.attention import guard as check
from lowbit.ops.attention import router, ways
from lowbit.ops.attention.guard import GUARDS

HEADS, D, TEXT = 2, 64, 7
EPS = torch.finfo(torch.bfloat16).eps


class Sampling:
    """A flow's order of noise: sigma is what is left of the sampling."""

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent


def within(
    override: Override, body, sigma: float = 1.0, text: int | None = TEXT, image=None, **given
):
    """Return body(options) as run within a run of the model, with the host's options there."""

    class Executor:
        class_obj = type("Model", (), {"model_sampling": Sampling()})

        def __call__(self, x, t, concat, context, control, options, **kwargs):
            return body(options)

    context = None if text is None else torch.zeros(1, text, 3)
    clip = {} if image is None else {"clip_fea": torch.zeros(1, image, 5)}
    options = {"sigmas": torch.tensor([sigma]), **given}
    return override.forward(Executor(), None, None, None, context, None, options, **clip)


def options_of(override: Override, **given) -> dict:
    """What the host's blocks find among the options, once the wrapper has run."""
    return within(override, lambda options: options, **given)


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


def call(override: Override, host, q, k, v, *args, given=None, **kwargs):
    """Return one call of attention within a run of the model; given: arguments of `within`."""

    def body(options):
        given = {"transformer_options": options, "_inside_attn_wrapper": True, **kwargs}
        return override(host, q, k, v, *args, **given)

    return within(override, body, **(given or {}))


def ran(*args, **kwargs) -> bool:
    """Return whether the override itself ran a call of attention, not the host."""
    return torch.is_tensor(call(*args, **kwargs))


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
    want = "left to the attention that was there: lowbit_exact: does not know float64"
    assert want in record.message


def test_auto_leaves_a_cpu_to_the_host(host):
    assert call(Override("auto"), host, *flat(), heads=HEADS) == "the host's"


@pytest.mark.parametrize("mode", ["sdpa", "cudnn", "flash"])
def test_sixteen_bits_are_no_low_precision(host, mode, monkeypatch):
    monkeypatch.setattr(router, "refusal", lambda *arguments: None)
    routed = []
    monkeypatch.setattr(router, "route", lambda q, k, v, way, **o: routed.append(way) or q)
    assert ran(Override(mode), host, *flat(), heads=HEADS, low_precision_attention=False)
    assert routed == [mode]


@pytest.mark.parametrize(
    ("length", "keys", "given", "meant"),
    [
        (9, 9, {}, {"self", "all"}),
        (9, TEXT, {}, {"cross", "all"}),
        # As many tokens as the text has: it may be either.
        (TEXT, TEXT, {}, {"all"}),
        (9, 9, {"text": None}, {"self", "all"}),
        (9, 5, {"image": 5}, {"image_cross", "all"}),
        (9, TEXT, {"image": 5}, {"cross", "all"}),
        (5, 5, {"image": 5}, {"all"}),
        # As many tokens of text as of the image.
        (9, TEXT, {"image": TEXT}, {"cross", "all"}),
    ],
    ids=str,
)
def test_layers_are_told_apart_by_their_lengths(host, length, keys, given, meant):
    q, k, v = flat(length, keys)
    assert {
        n for n in LAYERS if ran(Override("sdpa", n), host, q, k, v, heads=HEADS, given=given)
    } == meant


def test_image_is_told_from_as_long_a_text_by_its_precision(host):
    q, k, v = flat(9, TEXT)
    options = {"heads": HEADS, "low_precision_attention": False, "given": {"image": TEXT}}
    assert {n for n in LAYERS if ran(Override("sdpa", n), host, q, k, v, **options)} == {
        "image_cross",
        "all",
    }


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
    sigmas = (1.0, 0.75, 0.5, 0.25, 0.1)
    assert {
        s for s in sigmas if ran(override, host, *flat(), heads=HEADS, given={"sigma": s})
    } == meant


@pytest.mark.parametrize("mode", ["sageattn3_fp4", "lowbit_fp4"])
@pytest.mark.parametrize(("count", "first", "end"), [(1, 0, 0), (2, 0, 0), (4, 1, 3), (30, 3, 27)])
def test_four_bits_keep_to_the_middle_of_the_steps(host, monkeypatch, mode, count, first, end):
    monkeypatch.setattr(router, "refusal", lambda *arguments: None)
    monkeypatch.setattr(router, "route", lambda q, k, v, way, **options: q)
    sigmas = torch.linspace(1, 0, count + 1)
    # The second of two evaluations of one step lies between two sigmas, and is of that step.
    for between in (0.0, 0.3 / count):
        inner = [
            index
            for index, sigma in enumerate(sigmas[:-1].tolist())
            if ran(
                *(Override(mode), host, *flat()),
                heads=HEADS,
                given={"sigma": sigma - between, "sample_sigmas": sigmas},
            )
        ]
        assert inner == list(range(first, end))
    assert not ran(Override(mode), host, *flat(), heads=HEADS, given={"sigma": 0.5})


def test_blocks_are_counted_by_the_hosts_index(host):
    override = Override("sdpa", blocks="1-2, 5, 8-")
    blocks = [
        i for i in range(11) if ran(override, host, *flat(), heads=HEADS, given={"block_index": i})
    ]
    assert blocks == [1, 2, 5, 8, 9, 10]
    assert not ran(override, host, *flat(), heads=HEADS)


def test_call_outside_a_run_of_the_model_is_the_hosts(host):
    assert Override("sdpa")(host, *flat(), heads=HEADS) == "the host's"


def test_what_one_override_leaves_the_one_before_it_gets(host):
    first = Override("sdpa", "all")
    second = Override("lowbit_exact", blocks="0", previous=first)
    q, k, v = flat()
    options = options_of(first)
    got = call(second, host, q, k, v, HEADS, given={**options, "block_index": 1})
    assert torch.equal(got, joined(F.scaled_dot_product_attention(*map(split, (q, k, v)))))
    assert not host.calls


@pytest.mark.parametrize(("guard", "replaced"), [("off", 0), ("first_call", 1), ("every_call", 1)])
def test_guard_reaches_the_router(host, monkeypatch, caplog, guard, replaced):
    def broken(q, k, v, mode, **options):
        return torch.full_like(q, torch.nan)

    monkeypatch.setattr(ways, "attention", broken)
    check.forget()
    q, k, v = flat()
    for _ in range(2):
        got = call(Override("lowbit_exact", guard=guard), host, q, k, v, heads=HEADS)
        assert got.isfinite().all() == bool(replaced)
    check.forget()
    assert len(caplog.records) == replaced


@pytest.mark.parametrize("rotate", [False, True])
def test_rotation_reaches_the_router(host, monkeypatch, rotate):
    given = []

    def watched(q, k, v, mode, **options):
        given.append(options["rotate"])
        return torch.zeros_like(q)

    monkeypatch.setattr(ways, "attention", watched)
    call(Override("lowbit_exact", guard="off", rotate=rotate), host, *flat(), heads=HEADS)
    assert given == [rotate]


def test_rotation_is_left_out_where_auto_takes_16_bits(host, monkeypatch):
    monkeypatch.setattr(router, "choose", lambda *given, **options: "cudnn")
    monkeypatch.setattr(router, "refusal", lambda *given: None)
    given = []
    monkeypatch.setattr(router, "route", lambda q, *rest, **options: given.append(options) or q)
    call(Override("auto", rotate=True), host, *flat(), heads=HEADS)
    assert [options["rotate"] for options in given] == [False]


def test_rotation_of_a_mode_that_has_none_is_refused():
    with pytest.raises(ValueError, match="sdpa cannot rotate q and k; choose a lowbit"):
        Override("sdpa", rotate=True)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize(("mode", "rotate"), [("sdpa", False), ("lowbit_exact", True)])
def test_compiled_override_is_one_graph(host, mode, rotate, guard):
    override = Override(mode, guard=guard, rotate=rotate)
    q, k, v = flat()

    def body(options):
        run = functools.partial(override, host, heads=HEADS, transformer_options=options)
        compiled = torch.compile(lambda q: run(q, k, v) + 1, fullgraph=True, backend="aot_eager")
        return compiled(q), run(q, k, v) + 1

    got, want = within(override, body)
    assert torch.equal(got, want)


def compiled(host, counter):
    """Attention as the host compiles a model: what hangs on transformer options is not checked."""
    q, k, v = flat()

    def run(q, options):
        override = options["optimized_attention_override"]
        return override(host, q, k, v, heads=HEADS, transformer_options=options)

    forgetful = {"guard_filter_fn": lambda entries: ["options" not in e.name for e in entries]}
    model = torch.compile(run, fullgraph=True, backend=counter, options=forgetful)
    return functools.partial(model, q)


def test_another_step_compiles_nothing_anew(host):
    override, counter = Override("sdpa"), CompileCounter()
    model = compiled(host, counter)
    for sigma in (1.0, 0.75, 0.5):
        within(override, model, sigma, optimized_attention_override=override)
    assert counter.frame_count == 1


def test_compiled_model_sees_where_the_steps_begin_and_end(host):
    override, counter = Override("sdpa", steps=(0.25, 0.75)), CompileCounter()
    model = compiled(host, counter)
    sigmas = (1.0, 0.75, 0.5, 0.25, 0.1)
    given = {"optimized_attention_override": override}
    outs = [within(override, model, sigma, **given) for sigma in sigmas]
    assert [torch.is_tensor(out) for out in outs] == [False, True, True, False, False]
    # The host's double gives no graph; what the override computes is compiled once.
    assert counter.frame_count == 1


def test_compiled_model_sees_another_override(host):
    model = compiled(host, CompileCounter())
    overrides = [Override("sdpa"), Override("sdpa", "cross"), Override("sdpa")]
    outs = [within(o, model, optimized_attention_override=o) for o in overrides]
    assert [torch.is_tensor(out) for out in outs] == [True, False, True]


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
        ({"layers": "image"}, "unknown layers 'image'; known are self, cross, image_cross, all"),
        ({"guard": True}, "unknown guard True; known are off, first_call, every_call"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Override(**{"mode": "auto", **given})
