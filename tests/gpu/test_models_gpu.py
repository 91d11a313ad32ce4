"""Models quantized in Python on the GPU: diffusers' Wan and Qwen-Image, compiled and captured.

A CUDA graph cannot be captured of what waits for the GPU: whatever is captured here never does.
"""

import copy

import pytest
import torch
import torch._dynamo as dynamo

import lowbit
from lowbit.ops.attention import attention
from lowbit.ops.attention.modes import MODES
from lowbit.quant import formats
from lowbit.quant.demo.models import BATCH, MODELS, TEXT_WIDTH, weights

pytest.importorskip("diffusers", reason="diffusers is not installed")
TEXT_TOKENS = 16
BF16 = torch.bfloat16


def error(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.fixture(params=MODELS, ids=lambda small: small.name)
def small(request):
    return request.param


@pytest.fixture
def model(small):
    built = small.build()
    built.load_state_dict(weights(built, seed=0))
    return built.to("cuda", BF16)


@pytest.fixture
def run(small):
    generator = torch.Generator("cuda").manual_seed(0)
    latent = torch.randn(small.latent_shape, generator=generator, device="cuda").to(BF16)
    shape = (BATCH, TEXT_TOKENS, TEXT_WIDTH)
    text = torch.randn(shape, generator=generator, device="cuda").to(BF16)

    def once(model, sigma=0.5):
        with torch.inference_mode():
            return small.velocity(model, latent, sigma, text).clone()

    return once


@pytest.fixture(autouse=True)
def strict():
    dynamo.reset()
    dynamo.utils.counters.clear()
    with dynamo.config.patch(error_on_recompile=True):
        yield
    dynamo.reset()


@pytest.mark.parametrize("name", formats.names())
def test_quantized_model_follows_the_dense_one(model, run, name):
    want = run(model)
    with lowbit.quantize_model(model, name), lowbit.set_attention(model, "lowbit_exact"):
        got = run(model)
    # Four blocks, and activations as coarse as weights.
    assert 0 < error(got, want) < 2**0.5 * 4 * formats.get(name).max_error
    assert torch.equal(run(model), want)


def assert_as_exact(got, want, dense):
    """Compiled and not, a quantized model errs as much against the dense one.

    Inductor rounds chains of bf16 operations once, and quantizers may then round the other way:
    the two errors need not be the same ones.
    """
    allowed = error(want, dense)
    assert error(got, dense) < 1.1 * allowed
    assert error(got, want) < 2**0.5 * allowed


@pytest.mark.parametrize("name", formats.names())
def test_compiled_blocks_are_one_graph_and_compute_the_same(model, run, name):
    dense = run(model)
    lowbit.quantize_model(model, name)
    lowbit.set_attention(model, "lowbit_exact", layers="all")
    want = run(model)
    model.compile_repeated_blocks(fullgraph=True)
    got = run(model)
    run(model, 0.25)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_as_exact(got, want, dense)


@pytest.mark.parametrize("name", formats.names())
def test_cuda_graphs_of_compiled_blocks_compute_the_same(model, run, name):
    dense = run(model)
    lowbit.quantize_model(model, name)
    lowbit.set_attention(model, "lowbit_exact", layers="all")
    want = run(model)
    model.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = run(model)
    assert_as_exact(got, want, dense)


def captured(function, *inputs):
    """Return what a CUDA graph of `function` gives for `inputs`, captured on their copies."""
    inside = [copy.deepcopy(x) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Kernels are compiled and choices made before.
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*inside)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*inside)
    for buffer, x in zip(inside, inputs, strict=True):
        buffer.copy_(x * 2)
    for _ in range(2):
        graph.replay()
    return out


@pytest.mark.parametrize("rows", [7, 512])
@pytest.mark.parametrize("name", formats.names())
def test_layer_is_captured(name, rows):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024)).to("cuda", BF16).requires_grad_(False)
    lowbit.quantize_model(model, name, recipe="none")
    x = torch.randn(rows, 512, device="cuda", dtype=BF16)
    with torch.inference_mode():
        assert torch.equal(captured(model, x), model(x * 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_attention_is_captured(mode, masked):
    # So many keys are shared by several blocks of threads, whose counters begin at 0 each time.
    q, k, v = (torch.randn(1, 4, 2000, 128, device="cuda", dtype=BF16) for _ in range(3))
    mask = torch.rand(1, 1, 1, 2000, device="cuda") > 0.3 if masked else None

    def attend(q, k, v):
        return attention(q, k, v, mode, mask=mask)

    assert torch.equal(captured(attend, q, k, v), attend(q * 2, k * 2, v * 2))


@pytest.mark.parametrize("streamed", [False, True], ids=["waiting", "streamed"])
@pytest.mark.parametrize("name", ["int8_convrot", "nvfp4"])
def test_groups_that_are_offloaded_compute_the_same(model, run, name, streamed):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    dense = run(model)
    lowbit.quantize_model(model, name)
    joined = run(model)
    # Layers that are moved have hooks, and a GELU is rounded by itself before one that has.
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    want = run(model)
    for hook in hooks:
        hook.remove()
    assert_as_exact(want, joined, dense)
    options = {"use_stream": True, "record_stream": True} if streamed else {}
    model.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        **options,
    )
    assert all(p.device.type == "cpu" for block in model.children() for p in block.parameters())
    for _ in range(2):
        assert torch.equal(run(model), want)
