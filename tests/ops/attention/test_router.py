"""The router: what `auto` takes, what is refused and why, and that every way gives attention."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from lowbit.ops import registry, tuning
from lowbit.ops.attention import attention, router, ways
from lowbit.ops.attention.guard import GUARDS
from lowbit.ops.attention.modes import MODES
from lowbit.ops.attention.table import AUTO
from lowbit.ops.attention_fp4 import attention_fp4

LOWBIT = [f"lowbit_{mode}" for mode in MODES]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = tuning.Gpu("a GPU of tests", (9, 0), 132)


def inputs(b=1, h=2, kv=2, length=9, keys=11, d=128, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, h, length, d), (b, kv, keys, d), (b, kv, keys, d))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def sdpa(q, k, v, **options) -> torch.Tensor:
    """torch's attention in float64."""
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=q.shape[1] != k.shape[1], **options
    )


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, for choices that look at shapes alone."""

    device = CUDA


def on_gpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.as_subclass(OnGpu) for x in tensors]


@pytest.fixture(autouse=True)
def forgetful():
    """What was found out with a patched registry is of no other test."""
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0 on which every kernel's own test passes."""
    monkeypatch.setattr(registry, "capability", lambda device: (9, 0) if device == CUDA else None)
    monkeypatch.setattr(tuning, "gpu", lambda device: GPU if device == CUDA else None)
    monkeypatch.setattr(registry, "_self_test", lambda test, device: None)
    monkeypatch.setattr(registry, "_has_package", lambda name: name != "sageattention")


@pytest.mark.parametrize(
    ("tokens", "way"),
    [(256, "cudnn"), (4095, "cudnn"), (4096, "lowbit_exact"), (16384, "lowbit_fp8")],
)
def test_auto_takes_what_was_measured_for_a_length(hopper, tokens, way):
    q, k, v = on_gpu(*inputs(length=16384, keys=tokens))
    assert router.choose(q, k, v, "auto") == way


def test_auto_takes_a_mask_of_keys_but_no_other_to_the_kernel(hopper):
    q, k, v = on_gpu(*inputs(length=16384, keys=16384))
    of_keys, of_pairs = torch.ones(1, 1, 1, 16384), torch.ones(1, 1, 16384, 1).bool()
    assert router.choose(q, k, v, "auto", of_keys) == "lowbit_exact"
    assert router.choose(q, k, v, "auto", of_pairs) == "sdpa"


@pytest.mark.parametrize(
    "change",
    [
        {"length": 255},
        {"keys": 77},
        {"d": 64},
        {"d": 96},
        {"d": 256},
        {"dtype": torch.float32},
        {"mask": torch.ones(1, 1, 1024, 1024, dtype=torch.bool)},
        {"causal": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_auto_leaves_what_was_not_measured_to_torch(hopper, change):
    options = {name: change.pop(name) for name in ("mask", "causal") if name in change}
    q, k, v = on_gpu(*inputs(**{"length": 1024, "keys": 1024, **change}))
    assert router.choose(q, k, v, "auto", **options) == "sdpa"


def test_auto_takes_cudnn_where_8_bits_are_not_wanted(hopper):
    q, k, v = on_gpu(*inputs(length=8192, keys=8192))
    assert router.choose(q, k, v, "auto", bits_min=16) == "cudnn"


def test_auto_takes_cudnn_where_the_kernel_cannot_run(hopper, monkeypatch):
    def only_cudnn(test, device):
        return "NVRTC is missing" if test.__module__.endswith("hopper") else None

    monkeypatch.setattr(registry, "_self_test", only_cudnn)
    q, k, v = on_gpu(*inputs(length=8192, keys=8192))
    assert router.choose(q, k, v, "auto") == "cudnn"


@pytest.mark.parametrize("has", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_auto_leaves_gpus_that_were_not_measured_to_torch(hopper, monkeypatch, has):
    monkeypatch.setattr(registry, "capability", lambda device: has)
    q, k, v = on_gpu(*inputs(length=1024, keys=1024))
    assert router.choose(q, k, v, "auto") == "sdpa"


def test_auto_leaves_what_nothing_else_can_run_to_torch(hopper, monkeypatch):
    monkeypatch.setattr(registry, "_self_test", lambda test, device: "NVRTC is missing")
    q, k, v = on_gpu(*inputs(length=1024, keys=1024))
    assert router.choose(q, k, v, "auto") == "sdpa"


def test_rows_of_auto_name_ways_and_backends():
    for row in AUTO:
        assert row.way in router.NAMES
        assert row.backend in {None, *(b.name for b in registry.backends("attention"))}
        assert (row.backend is None) != row.way.startswith("lowbit_")


def test_auto_on_a_cpu_is_torch_bit_for_bit():
    q, k, v = inputs()
    assert torch.equal(router.route(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("mode", LOWBIT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [{}, {"b": 2, "h": 4}, {"length": 63, "d": 64}], ids=str)
def test_modes_on_a_cpu_are_within_their_error(mode, dtype, shape):
    q, k, v = inputs(**shape, dtype=dtype)
    got = router.route(q, k, v, mode)
    assert got.dtype == dtype
    assert error(got, sdpa(q, k, v)) <= MODES[mode.removeprefix("lowbit_")].max_error


@pytest.mark.parametrize("mode", ["sdpa", *LOWBIT])
def test_scale_mask_and_causal_reach_every_way(mode):
    q, k, v = inputs(length=11)
    rounding = torch.finfo(q.dtype).eps
    allowed = rounding if mode == "sdpa" else MODES[mode.removeprefix("lowbit_")].max_error
    hides = torch.ones(11, 11, dtype=torch.bool).tril(3)
    for options, same in (
        ({"scale": 0.5}, {"scale": 0.5}),
        ({"mask": hides}, {"attn_mask": hides}),
        ({"causal": True}, {"is_causal": True}),
    ):
        assert error(router.route(q, k, v, mode, **options), sdpa(q, k, v, **same)) <= allowed


@pytest.mark.parametrize("guard", GUARDS)
def test_rotation_reaches_the_ways_of_8_bits(monkeypatch, guard):
    given = []

    def watched(q, k, v, mode, **options):
        given.append((mode, options["rotate"]))
        return attention(q, k, v, mode, **options)

    monkeypatch.setattr(ways, "attention", watched)
    q, k, v = inputs()
    for mode in LOWBIT:
        for rotate in (False, True):
            got = router.route(q, k, v, mode, rotate=rotate, guard=guard)
            assert error(got, sdpa(q, k, v)) <= MODES[mode.removeprefix("lowbit_")].max_error
    assert given == [(mode.removeprefix("lowbit_"), r) for mode in LOWBIT for r in (False, True)]


def test_rotation_changes_nothing_where_auto_takes_torchs_and_is_refused_by_name():
    q, k, v = inputs()
    assert torch.equal(router.route(q, k, v, rotate=True), router.route(q, k, v))
    for mode in (name for name in router.NAMES if name not in ("auto", *LOWBIT)):
        with pytest.raises(ValueError, match=f"{mode} cannot rotate q and k"):
            router.route(q, k, v, mode, rotate=True)


def test_compiled_rotation_is_one_graph():
    q, k, v = inputs()

    def run(q):
        return router.route(q * 2, k, v, "lowbit_exact", rotate=True) + 1

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))


@pytest.mark.parametrize("mode", ["auto", "lowbit_exact"])
def test_both_layouts_give_equal_results(mode):
    q, k, v = inputs(h=4)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(router.route(*moved, mode), router.route(q, k, v, mode))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("sageattn", "sageattn"),
        ("sageattn_compiled", "sageattn"),
        ("sageattn_3", "sageattn3_fp4"),
        ("sageattn_3_fp4", "sageattn3_fp4"),
        ("sageattn_3_fp8", "lowbit_fp8"),
        ("flash_attn_2", "flash"),
    ],
)
def test_older_names_are_known(name, way):
    assert router.choose(*inputs(), name) == way


@pytest.mark.parametrize("name", router.NOT_BUILT)
def test_older_names_of_what_is_not_here_are_refused_with_a_choice(name):
    with pytest.raises(registry.NoBackendError, match=rf"{name}: .* choose .*auto"):
        router.route(*inputs(), name)


def test_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown mode 'fast'; known are auto, sdpa, cudnn, flash"):
        router.route(*inputs(), "fast")


def test_unknown_guard_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown guard 'on'; known are off, first_call, every"):
        router.route(*inputs(), guard="on")


@pytest.mark.parametrize(
    "mode", ["cudnn", "flash", "kitchen_int8", "sageattn", "sageattn3_fp4", "sageattn_3_fp4"]
)
def test_ways_of_gpus_are_refused_on_a_cpu(mode):
    with pytest.raises(registry.NoBackendError, match=r"needs a device of \['cuda'\], got cpu"):
        router.route(*inputs(), mode)
    assert "needs a device" in router.missing(mode, CPU)


@pytest.mark.parametrize("mode", ["auto", "sdpa", *LOWBIT, "lowbit_fp4", "sageattn_3_fp8"])
def test_what_a_cpu_runs_is_not_missing(mode):
    assert router.missing(mode, CPU) is None


def test_missing_package_is_named(hopper):
    assert router.missing("sageattn", CUDA) == "sageattn: package sageattention is missing"


def test_old_gpu_is_named(hopper, monkeypatch):
    monkeypatch.setattr(registry, "capability", lambda device: (8, 6))
    want = "lowbit_fp8: needs compute capability (8, 9), got (8, 6)"
    assert router.missing("lowbit_fp8", CUDA) == want
    assert router.missing("lowbit_int8", CUDA) is None


@pytest.mark.parametrize(
    ("mode", "change", "options", "text"),
    [
        ("lowbit_exact", {"d": 320}, {}, "above 256"),
        ("lowbit_exact", {"dtype": torch.float32}, {}, "does not know float32"),
        ("lowbit_exact", {"h": 3}, {}, "do not fit"),
        ("kitchen_int8", {}, {"causal": True}, "does not know bfloat16_causal"),
        ("lowbit_int8", {}, {"mask": torch.ones(9, 11, dtype=torch.int32)}, "bool or a float"),
        ("cudnn", {"d": 60}, {}, "not a multiple of 8"),
        ("cudnn", {}, {"causal": True}, "as many keys as queries"),
        ("cudnn", {"d": 264}, {}, "above 256"),
        ("flash", {}, {"mask": torch.ones(9, 11)}, "does not know bfloat16_masked"),
        ("sageattn", {}, {"mask": torch.ones(9, 11)}, "does not know bfloat16_masked"),
        ("sageattn", {}, {}, "sageattention is missing"),
        ("sageattn3_fp4", {}, {}, "needs compute capability (10, 0), got (9, 0)"),
        ("lowbit_fp4", {}, {}, "needs compute capability (10, 0), got (9, 0)"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_call_that_a_way_does_not_take_is_refused(hopper, mode, change, options, text):
    q, k, v = on_gpu(*inputs(**change))
    assert text in router.refusal(mode, q, k, v, **options)


@pytest.mark.parametrize("has", [(10, 0), (12, 0)])
def test_fp4_is_for_gpus_that_have_it_plain_calls_and_its_heads(hopper, monkeypatch, has):
    monkeypatch.setattr(registry, "capability", lambda device: has)
    assert router.missing("lowbit_fp4", CUDA) is None
    for change, options, text in (
        ({"d": 96}, {}, "K=96 is not a multiple of 64"),
        ({"d": 256}, {}, "above 128"),
        ({}, {"mask": torch.ones(9, 11)}, "does not know bfloat16_masked"),
        ({}, {"causal": True}, "does not know bfloat16_causal"),
        ({"dtype": torch.float32}, {}, "does not know float32"),
    ):
        assert text in router.refusal("lowbit_fp4", *on_gpu(*inputs(**change)), **options)


def test_fp4_on_a_gpu_runs_the_kernel_and_is_tried_first(hopper, monkeypatch):
    """Never the reference, which would be an emulation that nobody asked for."""
    monkeypatch.setattr(registry, "capability", lambda device: (12, 0))
    asked = []
    monkeypatch.setattr(ways, "attention_fp4", lambda *given: asked.append(given[-1]) or given[0])
    on_cuda, on_cpu = (b for b in registry.backends(ways.OP) if b.name == "lowbit_fp4")
    for q, k, v in (inputs(), on_gpu(*inputs())):
        on_cuda.run(q, k, v, None, False, None)
    assert asked == ["reference", "triton"] and on_cuda.needs.self_test
    assert on_cpu.needs.devices == {"cpu"}
    monkeypatch.setattr(registry, "_self_test", lambda test, device: "errs by 0.70 here")
    assert router.missing("lowbit_fp4", CUDA) == "lowbit_fp4: errs by 0.70 here"


@pytest.mark.parametrize("width", [64, 128])
def test_fp4_is_tried_with_the_head_size_that_is_asked_for(hopper, monkeypatch, width):
    monkeypatch.setattr(registry, "capability", lambda device: (12, 0))
    tried = []

    def of_cpu(q, k, v, scale, backend):
        tried.append(q.shape[3])
        return attention_fp4(q, k, v, scale) * (1 if q.shape[3] == 128 else 2)

    monkeypatch.setattr(ways, "attention_fp4", of_cpu)
    monkeypatch.setattr(registry, "_self_test", lambda test, device: test(torch.device("cpu")))
    refusal = router.refusal("lowbit_fp4", *on_gpu(*inputs(d=width)))
    assert tried == [width]
    # The other kernel, which is right, is no word for this one.
    assert refusal is None if width == 128 else "errs by 1." in refusal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp4_on_a_cpu_gives_the_numbers_of_its_format(dtype):
    q, k, v = inputs(h=4, kv=2, length=140, keys=300, dtype=dtype)
    got = router.route(q, k, v, "lowbit_fp4", guard="first_call")
    assert (got.dtype, got.shape) == (dtype, q.shape)
    assert torch.equal(got, attention_fp4(q, k, v))
    assert 0.05 < error(got, sdpa(q, k, v)) < 0.25
    assert ways.bits("lowbit_fp4") == 4 and not router.prepares("lowbit_fp4")


def test_inputs_are_not_written_to():
    q, k, v = inputs(dtype=torch.float32)
    before = [x.clone() for x in (q, k, v)]
    router.route(q, k, v, "lowbit_exact")
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("mode", ["auto", "lowbit_exact", "lowbit_fp4"])
def test_compiled_router_is_one_graph(mode):
    q, k, v = inputs()
    compiled = torch.compile(
        lambda q, k, v: router.route(q * 2, k, v, mode) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), router.route(q * 2, k, v, mode) + 1)


def test_other_lengths_compile_nothing_anew():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: router.route(q, k, v, "lowbit_exact"),
        **{"fullgraph": True, "dynamic": True, "backend": counter},
    )
    for length in (9, 12, 17):
        q, k, v = inputs(length=length)
        assert torch.equal(compiled(q, k, v), router.route(q, k, v, "lowbit_exact"))
    assert counter.frame_count == 1
