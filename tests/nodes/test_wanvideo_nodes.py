"""The nodes for WanVideoWrapper: permanent inputs, and what they make of a model of its kind."""

import types

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch._dynamo.testing import CompileCounter

from lowbit.nodes import host, wanvideo_linear, wanvideo_routing, wanvideo_weights
from lowbit.nodes.attention import MODES, ROTATIONS
from lowbit.nodes.attention_override import LAYERS, Override
from lowbit.nodes.quantize_wanvideo import LowBitQuantizeWanVideo
from lowbit.nodes.wanvideo_attention import LowBitWanVideoAttention
from lowbit.ops.attention import router
from lowbit.ops.attention.guard import GUARDS
from lowbit.ops.linear import sharing
from lowbit.ops.linear.arithmetic import ARITHMETICS, arithmetic_of
from lowbit.ops.registry import NoBackendError
from lowbit.quant import formats, recipe
from lowbit.quant.checkpoint.stored import marker_tensor
from tests.nodes import wanvideo_pack as pack

Q = "blocks.0.self_attn.q"


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    bar = types.SimpleNamespace(update=lambda steps: None)
    monkeypatch.setattr(host, "progress", lambda total: (bar, lambda: None))
    pack.calls.clear()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(1, 24, pack.WIDTH), torch.randn(1, 8, pack.WIDTH)


def attend(patcher, mode="lowbit_exact", layers="all", blocks="", steps=(0.0, 1.0), **options):
    rules = Override(mode, layers, blocks, steps, "off", **options)
    return wanvideo_routing.set_attention(patcher, rules)


def run(patcher, inputs, share=0.0):
    with torch.no_grad():
        return pack.loaded(patcher)(*inputs, current_step_percentage=share)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_rotation_reaches_the_router(inputs, monkeypatch):
    given, route = [], router.route

    def watched(*call, **options):
        given.append(options["rotate"])
        return route(*call, **options)

    monkeypatch.setattr(router, "route", watched)
    node = LowBitWanVideoAttention()
    values = ("lowbit_exact", "all", "", 0.0, 1.0, "off")
    for more, rotate in (({}, False), ({"rotation": "hadamard"}, True)):
        given.clear()
        (made,) = node.set_attention(pack.make(), *values, **more)
        run(made, inputs)
        assert given and all(was == rotate for was in given)


def test_inputs_are_those_that_workflows_hold():
    given = LowBitQuantizeWanVideo.INPUT_TYPES()
    # Older workflows lack it.
    assert {n: kind for n, (kind, _) in given["optional"].items()} == {
        "arithmetic": list(ARITHMETICS)
    }
    choices = ["as_stored", *formats.names()]
    assert [(n, kind) for n, (kind, _) in given["required"].items()] == [
        ("model", "WANVIDEOMODEL"),
        ("format", choices),
        ("recipe", list(recipe.names())),
        ("keep", "STRING"),
    ]
    given = LowBitWanVideoAttention.INPUT_TYPES()
    assert {n: kind for n, (kind, _) in given["optional"].items()} == {"rotation": list(ROTATIONS)}
    attention = given["required"]
    assert [(n, kind) for n, (kind, _) in attention.items()] == [
        ("model", "WANVIDEOMODEL"),
        ("mode", list(MODES)),
        ("layers", list(LAYERS)),
        ("blocks", "STRING"),
        ("start_percent", "FLOAT"),
        ("end_percent", "FLOAT"),
        ("guard", list(GUARDS)),
    ]


@pytest.mark.parametrize("name", formats.names())
def test_every_format_gives_nearly_the_plain_result(name, inputs):
    patcher = pack.make()
    made = wanvideo_weights.quantize(patcher, name)
    assert 0 < difference(run(made, inputs), run(patcher, inputs)) < formats.get(name).max_error


def test_model_that_comes_in_stays_as_it_is():
    patcher = pack.make()
    state, modules = patcher.model["sd"], dict(patcher.model.diffusion_model.named_modules())
    before = {name: tensor.clone() for name, tensor in state.items()}
    made = attend(wanvideo_weights.quantize(patcher, "int8"))
    assert patcher.model["sd"] is state and made.model["sd"] is None
    assert dict(patcher.model.diffusion_model.named_modules()) == modules
    assert not {id(m) for m in modules.values()} & {
        id(m) for m in made.model.diffusion_model.modules()
    }
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert all(p.is_meta for p in patcher.model.diffusion_model.parameters())


def test_merged_weights_are_quantized(inputs):
    patcher = pack.make()
    wanted = run(wanvideo_weights.quantize(patcher, "int8"), inputs)
    pack.loaded(patcher)
    patcher.model["sd"] = None
    assert torch.equal(run(wanvideo_weights.quantize(patcher, "int8"), inputs), wanted)


@pytest.mark.parametrize("flagged", [False, True])
def test_scale_of_a_scaled_file_stays_in_float32(flagged, inputs):
    scale = torch.tensor(0.0012345679)
    assert scale.bfloat16().float() != scale
    patcher = pack.make()
    state = patcher.model["sd"]
    dense = state[f"{Q}.weight"]
    state[f"{Q}.weight"] = stored = (dense / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    state[f"{Q}.scale_weight"] = scale
    state["scaled_fp8"] = torch.empty(2 if flagged else 0, dtype=torch.float8_e4m3fn)
    made = wanvideo_weights.quantize(patcher, "as_stored")
    layer = made.model.diffusion_model.get_submodule(Q)
    assert torch.equal(layer.weight._qdata.view(torch.uint8), stored.view(torch.uint8))
    assert layer.weight._params.scale == scale
    # A flag of two elements asks for products in full precision.
    assert layer.full_precision is flagged
    x = inputs[0]
    exact = torch.nn.functional.linear(x, stored.float() * scale, state[f"{Q}.bias"])
    limit = 1e-6 if flagged else formats.get("fp8_e4m3").max_error
    assert difference(layer(x), exact) < limit


@pytest.mark.parametrize("name", formats.names())
def test_stored_layer_keeps_its_bits(name):
    patcher = pack.make()
    state, fmt = patcher.model["sd"], formats.get(name)
    wanted = fmt.quantize(state.pop(f"{Q}.weight"))
    stored = fmt.pack(wanted) | {"comfy_quant": marker_tensor(fmt.marker)}
    state |= {f"{Q}.{part}": tensor for part, tensor in stored.items()}
    # As the loader renames them.
    patcher.model["sd"] = {n.replace(".weight_scale", ".scale_weight"): t for n, t in state.items()}
    made = wanvideo_weights.quantize(patcher, "as_stored")
    weight = made.model.diffusion_model.get_submodule(Q).weight
    assert formats.of(weight) is fmt
    assert torch.equal(weight.dequantize(), wanted.dequantize())


def test_integers_without_a_marking_are_refused():
    patcher = pack.make()
    weight = patcher.model["sd"][f"{Q}.weight"]
    patcher.model["sd"][f"{Q}.weight"] = (weight * 100).to(torch.int8)
    with pytest.raises(ValueError, match="no tensor says in which format"):
        wanvideo_weights.quantize(patcher, "int8")


def test_quantized_twice_is_the_later(inputs):
    patcher = pack.make()
    made = wanvideo_weights.quantize(wanvideo_weights.quantize(patcher, "int8"), "fp8_e4m3")
    weight = made.model.diffusion_model.get_submodule(Q).weight
    assert formats.of(weight).name == "fp8_e4m3"
    error = formats.get("int8").max_error + formats.get("fp8_e4m3").max_error
    assert difference(run(made, inputs), run(patcher, inputs)) < error


@pytest.fixture
def anywhere(monkeypatch):
    """Every arithmetic can run, as on a GPU."""
    for where, name in (
        (wanvideo_weights.arithmetic, "check"),
        (wanvideo_weights, "log_arithmetic"),
    ):
        monkeypatch.setattr(where, name, lambda *arguments: None)


def weights(patcher) -> dict[str, QuantizedTensor]:
    """Return the quantized weights of a model, by the layer's name."""
    modules = patcher.model.diffusion_model.named_modules()
    found = {name: getattr(module, "weight", None) for name, module in modules}
    return {name: w for name, w in found.items() if isinstance(w, QuantizedTensor)}


def wishes(patcher) -> set[str]:
    return {arithmetic_of(weight) for weight in weights(patcher).values()}


def test_wish_reaches_every_layer_of_4_bits_and_changes_no_bits(anywhere):
    node, values = LowBitQuantizeWanVideo(), (pack.make(), "nvfp4", "none", "")
    (plain,), (made,) = node.quantize(*values), node.quantize(*values, arithmetic="w4a16")
    assert (wishes(plain), wishes(made)) == ({"auto"}, {"w4a16"})
    for name, weight in weights(plain).items():
        assert torch.equal(weight.dequantize(), weights(made)[name].dequantize()), name
    made.model.diffusion_model.to("meta")
    assert wishes(made) == {"w4a16"}


def test_least_error_is_answered_for_each_layer(anywhere):
    made = wanvideo_weights.quantize(pack.make(), "mxfp4", "none", wish="w4a8_exact")
    assert wishes(made) <= {"w4a8_fp8", "w4a8_int8"}


def test_later_node_keeps_the_wish_or_says_another(anywhere):
    made = wanvideo_weights.quantize(pack.make(), "nvfp4", "none", wish="w4a16")
    assert wishes(wanvideo_weights.quantize(made, "nvfp4", "none")) == {"w4a16"}
    assert wishes(wanvideo_weights.quantize(made, "nvfp4", "none", wish="w4a8")) == {"w4a8"}
    assert wishes(made) == {"w4a16"}


@pytest.mark.parametrize(
    ("name", "wish", "error", "message"),
    [
        ("nvfp4", "w4a8", NoBackendError, "w4a8: needs a device of"),
        ("mxfp4", "native", NoBackendError, "w4a4: needs a device of"),
        ("int8", "w4a8", ValueError, "w4a8 is for nvfp4, mxfp4, not for int8"),
        ("nvfp4", "fast", ValueError, "arithmetic is 'fast'"),
    ],
)
def test_arithmetic_that_cannot_be_is_refused_as_by_quantize_model(name, wish, error, message):
    with pytest.raises(error, match=message):
        wanvideo_weights.quantize(pack.make(), name, wish=wish)


@pytest.mark.parametrize(
    ("stored", "error", "message"),
    [
        ("int8", ValueError, "arithmetic w4a8: the model has no layers of nvfp4, mxfp4"),
        ("nvfp4", NoBackendError, "w4a8: needs a device of"),
    ],
)
def test_arithmetic_that_stored_layers_cannot_have_is_refused(stored, error, message):
    patcher, fmt = pack.make(), formats.get(stored)
    state = patcher.model["sd"]
    parts = fmt.pack(fmt.quantize(state.pop(f"{Q}.weight")))
    parts["comfy_quant"] = marker_tensor(fmt.marker)
    state |= {f"{Q}.{part}": tensor for part, tensor in parts.items()}
    with pytest.raises(error, match=message):
        wanvideo_weights.quantize(patcher, "as_stored", wish="w4a8")


def test_log_says_which_arithmetic_runs(caplog):
    caplog.set_level("INFO")
    wanvideo_weights.quantize(pack.make(), "mxfp4")
    assert "of mxfp4 weights, emulated: dequantized" in caplog.text


def test_only_what_moves_with_its_block_is_quantized():
    made = wanvideo_weights.quantize(pack.make(), "int8", "none").model.diffusion_model
    assert isinstance(made.get_submodule(Q).weight, QuantizedTensor)
    assert not isinstance(made.head.head.weight, QuantizedTensor)


def test_weights_move_with_their_block():
    block = wanvideo_weights.quantize(pack.make(), "nvfp4").model.diffusion_model.blocks[0]
    block.to("meta", non_blocking=True)
    weight = block.self_attn.q.weight
    assert isinstance(weight, QuantizedTensor)
    assert weight._qdata.is_meta and weight._params.scale.is_meta


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q", "blocks.0.ffn.2", "head.head"])
def test_loras_beside_the_weight_are_loras_in_the_weight(name):
    layer = wanvideo_weights.quantize(pack.make(), "int8").model.diffusion_model.get_submodule(name)
    n, k = layer.weight.shape
    torch.manual_seed(2)
    up, down, whole = torch.randn(n, 4), torch.randn(4, k), torch.randn(n, k)
    x = torch.randn(3, k)
    plain = layer(x)
    layer.set_lora_diffs([(up, down, 2.0), (up, down, None), (whole,)], device="cpu")
    layer.set_lora_strengths([[0.5, -1.0], 0.25, 0.125], device="cpu")
    for step, strength in enumerate((0.5, -1.0)):
        layer._step.fill_(step)
        delta = up @ down * (strength * 2.0 / 4 + 0.25) + whole * 0.125
        wanted = plain + torch.nn.functional.linear(x, delta)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-3)
        gelu = torch.nn.functional.gelu(x, approximate="tanh")
        torch.testing.assert_close(layer.after_gelu(x), layer(gelu))
    del layer.lora_diff_0_0
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"gguf_reader": ["reader"]}, "GGUF"),
        ({"fp8_matmul": True, "quantization": "fp8_e4m3fn_fast"}, "fp8_e4m3fn_fast"),
        ({"auto_cpu_offload": True}, "vram_management_args"),
        ({"control_lora": True}, "control LoRA"),
    ],
)
def test_what_cannot_stay_is_refused_by_name(about, message):
    with pytest.raises(ValueError, match=message):
        wanvideo_weights.quantize(pack.make(**about), "int8")


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="WanVideo Model Loader"):
        attend(pack.Patcher(torch.nn.Linear(2, 2)))


def test_missing_tensor_is_named():
    patcher = pack.make()
    del patcher.model["sd"]["blocks.1.modulation"]
    with pytest.raises(ValueError, match=r"has no tensor blocks\.1\.modulation"):
        wanvideo_weights.quantize(patcher, "int8")


@pytest.mark.parametrize(
    ("options", "routed"),
    [
        ({}, 4),
        ({"layers": "self"}, 2),
        ({"layers": "cross"}, 2),
        ({"blocks": "1"}, 2),
        ({"steps": (0.5, 1.0)}, 0),
        ({"steps": (0.0, 0.5)}, 4),
    ],
)
def test_layers_that_are_meant_go_to_the_router(options, routed, inputs):
    patcher = pack.make()
    plain = run(patcher, inputs)
    pack.calls.clear()
    out = run(attend(patcher, **options), inputs)
    # The pack's own function is called for the others alone, in their own mode.
    assert pack.calls == ["sdpa"] * (4 - routed)
    assert torch.equal(out, plain) is (routed == 0)
    assert difference(out, plain) < 0.01


def test_last_step_is_within_the_sampling(inputs):
    made = attend(pack.make(), steps=(0.5, 1.0))
    pack.calls.clear()
    run(made, inputs, share=1.0)
    assert pack.calls == []


def test_call_that_the_router_has_not_goes_to_the_pack_in_its_own_mode(inputs):
    patcher = pack.make()
    for block in patcher.model.diffusion_model.blocks:
        block.self_attn.attention_mode = "sageattn"
    # `auto` has nothing for a CPU.
    run(attend(patcher, "auto"), inputs)
    assert pack.calls == ["sageattn", "sdpa"] * pack.BLOCKS


def test_of_two_the_later_decides_first(inputs):
    patcher = pack.make()
    both = attend(attend(patcher, blocks="0", steps=(0.0, 0.5)), "sdpa", blocks="1")
    for share, wanted in ((0.0, 0), (0.5, 2), (0.0, 0)):
        pack.calls.clear()
        run(both, inputs, share)
        assert pack.calls == ["sdpa"] * wanted


def test_layers_of_another_version_are_refused(monkeypatch):
    monkeypatch.delattr(pack.SelfAttention, "forward")
    with pytest.raises(ValueError, match="calls no function attention"):
        attend(pack.make())


def test_one_graph_for_all_blocks_under_compile(inputs):
    made = attend(wanvideo_weights.quantize(pack.make(), "int8"))
    wanted = run(made, inputs)
    counter = CompileCounter()
    blocks = made.model.diffusion_model.blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend=counter, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(made.model.diffusion_model(*inputs), wanted)
        made.model.diffusion_model(*inputs, current_step_percentage=0.5)
    assert counter.frame_count == 1


def test_compiled_blocks_come_back_plain(inputs):
    made = attend(wanvideo_weights.quantize(pack.make(), "int8"))
    wanted = run(made, inputs)
    blocks = made.model.diffusion_model.blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")
    made.patches = {"diffusion_model.blocks.0._orig_mod.self_attn.q.weight": ["patch"]}
    again = attend(made, "sdpa", blocks="7")
    assert all(type(block) is pack.Block for block in again.model.diffusion_model.blocks)
    assert again.patches == {"diffusion_model.blocks.0.self_attn.q.weight": ["patch"]}
    assert torch.equal(run(again, inputs), wanted)


def test_layers_that_read_one_tensor_share_it(monkeypatch):
    made = wanvideo_weights.quantize(pack.make(), "int8").model.diffusion_model
    counts = []
    monkeypatch.setattr(wanvideo_linear, "share", lambda x, readers: counts.append(readers))
    attention, ffn = made.blocks[0].self_attn, made.blocks[0].ffn
    x = torch.randn(2, pack.WIDTH)
    for layer in (attention.q, attention.k, attention.v, attention.o, ffn.get_submodule("0")):
        layer(x)
    assert counts == [3, 3, 3, 1, 1]


def test_nothing_of_a_shared_tensor_is_kept():
    attention = wanvideo_weights.quantize(pack.make(), "int8").model.diffusion_model.blocks[0]
    x = torch.randn(2, pack.WIDTH)
    for name in "qkv":
        attention.self_attn.get_submodule(name)(x)
    assert not hasattr(x, sharing.ATTRIBUTE)
