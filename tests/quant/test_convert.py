"""From one checkpoint to another: which tensors, under which names, with which values."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.quant import formats
from lowbit.quant.checkpoint import Checkpoint, CheckpointError
from lowbit.quant.checkpoint.foreign import Request
from lowbit.quant.checkpoint.stored import check_can_stay, marker_tensor, stored_layers
from lowbit.quant.convert import plan, plan_as_stored, stream
from tests.checkpoints import write_wan

LAYERS = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]
# For what does not depend on the format: quick, and in every host.
FORMAT = "fp8_e4m3"


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan") / "wan.safetensors", layers=1)


@pytest.fixture(scope="module")
def dense(wan) -> dict[str, torch.Tensor]:
    return load_file(wan)


@pytest.fixture
def save(tmp_path):
    """A function (tensors, metadata) -> an open Checkpoint that holds them."""

    def write(tensors, metadata=None, name="a") -> Checkpoint:
        path = tmp_path / f"{name}.safetensors"
        save_file({n: t.clone() for n, t in tensors.items()}, path, metadata)
        return Checkpoint(path)

    return write


def convert(checkpoint, fmt=FORMAT, recipe="auto", keep=()):
    """Return (plan after it has run, tensors of the result by name)."""
    work = plan(checkpoint, fmt, recipe, keep)
    pairs = list(stream(work))
    result = dict(pairs)
    assert len(result) == len(pairs)
    return work, result


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def parts(fmt: formats.Format, result: dict, layer: str) -> dict[str, torch.Tensor]:
    """Return what the result holds of a layer, without bias and marker."""
    names = {"weight", *fmt.scales.values()}
    return {p: result[f"{layer}.{p}"] for p in names if f"{layer}.{p}" in result}


@pytest.fixture(params=formats.names())
def fmt(request):
    return formats.get(request.param)


def test_each_layer_holds_its_format_a_marker_and_its_true_error(wan, dense, fmt):
    work, result = convert(Checkpoint(wan), fmt.name)
    quantized = {r.name: r for r in work.records if r.format}
    assert set(quantized) == {f"blocks.0.{layer}" for layer in LAYERS}
    for name, record in quantized.items():
        weight = dense[f"{name}.weight"].float()
        stored = parts(fmt, result, name)
        marker = json.loads(bytes(result[f"{name}.comfy_quant"].tolist()))
        assert marker == fmt.marker
        values = fmt.unpack(stored, torch.float32, tuple(weight.shape), marker).dequantize()
        error = ((values - weight).double().norm() / weight.double().norm()).item()
        assert record.error == pytest.approx(error, rel=1e-4)
        assert record.error <= fmt.max_error
        assert record.shape == weight.shape
        bytes_on_disk = sum(t.nbytes for t in stored.values())
        assert record.size_bytes == bytes_on_disk + result[f"{name}.comfy_quant"].nbytes


def test_all_other_tensors_are_copied_bit_for_bit(wan, dense):
    work, result = convert(Checkpoint(wan))
    layers = {f"{r.name}.weight" for r in work.records if r.format}
    added = {n for n in result if n.endswith((".weight_scale", ".comfy_quant"))}
    assert set(result) - added == set(dense)
    assert all(same(result[n], dense[n]) for n in set(dense) - layers)
    kept = {r.name: r.reason for r in work.records if r.format is None}
    assert "never quantized" in kept["head.head"]
    assert all(kept.values())


def test_same_file_gives_the_same_bytes(wan, fmt):
    (_, first), (_, again) = (convert(Checkpoint(wan), fmt.name) for _ in range(2))
    assert first.keys() == again.keys()
    assert all(same(first[n], again[n]) for n in first)


def test_4_bits_have_8_bit_companions_at_the_ends_of_a_deep_model(tmp_path):
    path = write_wan(tmp_path / "deep.safetensors", layers=9, ffn=256)
    work = plan(Checkpoint(path), "convrot_w4a4")
    chosen = {s.layer: s.choice.format.name for s in work.layers}
    assert chosen["blocks.0.self_attn.q"] == chosen["blocks.8.ffn.2"] == "int8_convrot"
    assert chosen["blocks.4.self_attn.q"] == "convrot_w4a4"
    result = dict(stream(work))
    for layer in ("blocks.0.self_attn.q", "blocks.4.self_attn.q"):
        marker = json.loads(bytes(result[f"{layer}.comfy_quant"].tolist()))
        assert formats.from_marker(marker).name == chosen[layer]
    record = json.loads(work.metadata()["_lowbit"])["layers"]["blocks.0.self_attn.q"]
    assert record["format"] == "int8_convrot"
    assert "near the input" in record["reason"]


def test_recipe_none_quantizes_every_matrix(wan, dense):
    work, _ = convert(Checkpoint(wan), recipe="none")
    matrices = {n.removesuffix(".weight") for n, t in dense.items() if t.dim() == 2}
    assert {r.name for r in work.records if r.format} == matrices


def test_keep_keeps_bit_for_bit_and_says_so(wan, dense):
    work, result = convert(Checkpoint(wan), keep=["ffn"])
    assert same(result["blocks.0.ffn.0.weight"], dense["blocks.0.ffn.0.weight"])
    assert "blocks.0.ffn.0.comfy_quant" not in result
    reasons = {r.name: r.reason for r in work.records}
    assert reasons["blocks.0.ffn.0"] == "kept as asked: ffn"


def test_metadata_is_kept_and_the_record_added(save, dense):
    source = {"format": "pt", "config": '{"a": 1}', "_quantization_metadata": '{"layers": {}}'}
    source["_lowbit"] = '{"layers": {"blocks.0.ffn.0": {"error": 0.5}}}'
    work, _ = convert(save(dense, source))
    metadata = work.metadata()
    assert metadata.keys() == {"format", "config", "_lowbit"}
    assert (metadata["format"], metadata["config"]) == ("pt", '{"a": 1}')
    record = json.loads(metadata["_lowbit"])
    assert (record["format"], record["recipe"]) == (FORMAT, "auto")
    assert (record["family"], record["variant"]) == ("wan", "t2v")
    errors = {r.name: r.error for r in work.records if r.format}
    assert record["layers"].keys() == errors.keys()
    for name, error in errors.items():
        assert record["layers"][name]["error"] == pytest.approx(error, rel=1e-3)
    assert record["kept"] == {r.name: r.reason for r in work.records if not r.format}


def test_layer_that_is_in_the_format_already_is_copied_bit_for_bit(wan, save, fmt):
    _, once = convert(Checkpoint(wan), fmt.name, keep=["attn", r"ffn\.2"])
    work, again = convert(save(once), fmt.name, keep=["attn", r"ffn\.2"])
    assert once.keys() == again.keys()
    assert all(same(once[n], again[n]) for n in once)
    (record,) = [r for r in work.records if r.format]
    assert (record.error, record.reason) == (None, "as stored")


def test_marker_of_a_copied_layer_keeps_its_options(wan, save):
    _, once = convert(Checkpoint(wan))
    marker = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    once["blocks.0.ffn.0.comfy_quant"] = marker_tensor(marker)
    once["blocks.0.ffn.0.input_scale"] = torch.tensor(0.5)
    _, again = convert(save(once))
    assert json.loads(bytes(again["blocks.0.ffn.0.comfy_quant"].tolist())) == marker
    assert again["blocks.0.ffn.0.input_scale"] == 0.5


def test_quantized_source_is_dequantized_with_its_scales(wan, save):
    """To another format, or to bf16 where a layer is kept; nothing of the old one stays."""
    fp8 = formats.get("fp8_e4m3")
    _, source = convert(Checkpoint(wan))
    source["blocks.0.ffn.0.input_scale"] = torch.tensor(0.5)
    work, result = convert(save(source), "int8", keep=[r"ffn\.0"])
    for name in [r.name for r in work.records if r.format]:
        values = fp8.unpack(parts(fp8, source, name), torch.float32).dequantize()
        want = formats.get("int8").pack(formats.get("int8").quantize(values))
        assert all(same(result[f"{name}.{p}"], t) for p, t in want.items())
    values = fp8.unpack(parts(fp8, source, "blocks.0.ffn.0"), torch.float32).dequantize()
    assert same(result["blocks.0.ffn.0.weight"], values.bfloat16())
    left = [n for n in result if n.startswith("blocks.0.ffn.0.")]
    assert sorted(left) == ["blocks.0.ffn.0.bias", "blocks.0.ffn.0.weight"]


def test_legacy_fp8_is_read_with_its_scales_and_loses_its_marks(wan, save):
    _, source = convert(Checkpoint(wan))
    names = {"weight_scale": "scale_weight"}
    old = {}
    for name, tensor in source.items():
        module, _, part = name.rpartition(".")
        if part != "comfy_quant":
            old[f"{module}.{names.get(part, part)}"] = tensor
    old["blocks.0.ffn.0.scale_input"] = torch.tensor(0.5)
    old["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    checkpoint = save(old)
    _, copied = convert(checkpoint)
    assert set(copied) == set(source) | {"blocks.0.ffn.0.input_scale"}
    assert all(same(copied[n], source[n]) for n in source if not n.endswith(".comfy_quant"))
    marker = json.loads(bytes(copied["blocks.0.ffn.2.comfy_quant"].tolist()))
    assert marker["full_precision_matrix_mult"] is True
    _, result = convert(checkpoint, "int8")
    assert not [n for n in result if n.endswith(("scale_weight", "_input", "input_scale", "_fp8"))]


def test_unscaled_fp8_is_widened_to_bf16_before_it_is_quantized(dense, save):
    fp8 = {n: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for n, t in dense.items()}
    _, result = convert(save(fp8), "int8")
    assert same(result["head.head.weight"], fp8["head.head.weight"].bfloat16())
    want = formats.get("int8").quantize(fp8["blocks.0.ffn.0.weight"].bfloat16())
    assert same(result["blocks.0.ffn.0.weight"], want._qdata)


@pytest.mark.parametrize("name", ["blocks.0.ffn.0", "head.head"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_unmarked_integers_are_refused_by_name(dense, save, dtype, name):
    """Some other packing, such as bitsandbytes', whose scale this pack does not know."""
    packed = torch.arange(64 * 64).reshape(64, 64).to(dtype)
    other = {f"{name}.weight": packed, f"{name}.SCB": torch.ones(64)}
    checkpoint = save(dense | other)
    reason = rf"layer {name}: weight \w+ \[64, 64\] with (bias, )?SCB(, \w+)* beside it"
    for recipe in ("auto", "none"):
        with pytest.raises(CheckpointError, match=reason):
            plan(checkpoint, FORMAT, recipe)
    with pytest.raises(CheckpointError, match=reason):
        plan_as_stored(checkpoint, Request(), FORMAT)
    with pytest.raises(CheckpointError, match=reason):
        check_can_stay(checkpoint, stored_layers(checkpoint))


def test_integers_of_another_model_in_the_file_are_left_as_they_are(dense, save):
    packed = torch.arange(64 * 64).reshape(64, 64).to(torch.int8)
    other = {"text_encoders.t5.weight": packed}
    checkpoint = save({f"model.diffusion_model.{n}": t for n, t in dense.items()} | other)
    _, result = convert(checkpoint)
    assert same(result["text_encoders.t5.weight"], packed)
    check_can_stay(checkpoint, stored_layers(checkpoint))


@pytest.mark.parametrize(
    ("prefix", "written"),
    # ComfyUI looks for a model under the first, not under the second.
    [("model.diffusion_model.", "model.diffusion_model."), ("diffusion_model.", "")],
)
def test_prefix_that_comfyui_knows_is_kept_and_other_models_too(dense, save, prefix, written):
    others = {"vae.decoder.weight": torch.ones(256, 256), "scalar": torch.ones(())}
    work, result = convert(save({prefix + n: t for n, t in dense.items()} | others))
    assert f"{written}blocks.0.ffn.0.comfy_quant" in result
    assert all(same(result[n], t) for n, t in others.items())
    assert {r.name for r in work.records if r.format} == {f"blocks.0.{n}" for n in LAYERS}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_padded_layer_is_read_back_in_its_own_shape(dense, save, prefix):
    odd = {n: t for n, t in dense.items() if not n.startswith("blocks.0.ffn.")}
    odd["blocks.0.ffn.0.weight"] = dense["blocks.0.ffn.0.weight"][:500, :250]
    work, result = convert(save({prefix + n: t for n, t in odd.items()}), "nvfp4")
    packed = save(result, work.metadata(), "packed")
    again, dequantized = convert(packed, "fp8_e4m3_rowwise")
    assert dequantized[f"{prefix}blocks.0.ffn.0.weight"].shape == (500, 250)
    shapes = {r.name: r.shape for r in again.records}
    assert shapes["blocks.0.ffn.0"] == (500, 250)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_layer_with_nan_is_named_with_its_file(dense, save, bad):
    weight = dense["blocks.0.ffn.0.weight"].clone()
    weight[5, 5] = bad
    checkpoint = save(dense | {"blocks.0.ffn.0.weight": weight})
    with pytest.raises(formats.NotFiniteError, match=r"layer blocks.0.ffn.0: .*NaN") as error:
        convert(checkpoint)
    assert checkpoint.path in str(error.value)


def with_nan(tensor):
    """The tensor with NaN, whatever its type, as its first value."""
    bad = tensor.clone().reshape(-1)
    bad.view(torch.uint8)[: bad.element_size()] = 0x7F if bad.element_size() == 1 else 0xFF
    return bad.reshape(tensor.shape)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "nvfp4"])
@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_2", "input_scale"])
def test_nan_in_a_layer_that_is_copied_is_named(wan, save, name, part):
    """Copied, it would be a black picture that nobody was told of."""
    _, source = convert(Checkpoint(wan), name, "none")
    key = f"blocks.0.ffn.0.{part}"
    source["blocks.0.ffn.0.input_scale"] = torch.tensor(0.5)
    if key not in source or (name == "nvfp4" and part == "weight"):
        pytest.skip("no such tensor, or none that can hold NaN")
    checkpoint = save(source | {key: with_nan(source[key])})
    match = rf"a\.safetensors: layer blocks\.0\.ffn\.0: {part} holds 1 NaN"
    for work in (plan(checkpoint, name, "none"), plan_as_stored(checkpoint, Request(), FORMAT)):
        with pytest.raises(formats.NotFiniteError, match=match):
            list(stream(work))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "mxfp4"])
def test_nan_in_the_padding_of_scales_is_copied(dense, save, name):
    """It is of no weight, and other programs leave anything there."""
    narrow = {"blocks.0.ffn.0.weight": dense["blocks.0.ffn.0.weight"][:, :32]}
    _, source = convert(save(narrow), name, "none")
    scale = source["blocks.0.ffn.0.weight_scale"].view(torch.uint8)
    source["blocks.0.ffn.0.weight_scale"] = torch.where(scale == 0, 255, scale)
    _, result = convert(save(source), name, "none")
    assert result["blocks.0.ffn.0.weight_scale"].view(torch.uint8).eq(255).any()


def test_nan_in_a_layer_that_is_kept_stays_and_is_told(dense, save):
    head = torch.full_like(dense["head.head.weight"], torch.nan)
    work, result = convert(save(dense | {"head.head.weight": head}))
    assert same(result["head.head.weight"], head)
    assert work.notes == [f"head.head.weight holds {head.numel()} NaN or Inf, which stay"]


def test_signed_numbers_under_a_marking_of_fp8_are_refused(wan, save):
    _, source = convert(Checkpoint(wan))
    wrong = {"blocks.0.ffn.0.weight": source["blocks.0.ffn.0.weight"].view(torch.int8)}
    checkpoint = save(source | wrong)
    with pytest.raises(CheckpointError, match=r"layer blocks\.0\.ffn\.0: .* weight is torch.int8"):
        list(stream(plan_as_stored(checkpoint, Request(), FORMAT)))


def test_nothing_to_quantize_is_an_error(dense, save):
    with pytest.raises(CheckpointError, match="nothing to quantize to int8 under recipe auto"):
        plan(save(dense), "int8", keep=["."])
    with pytest.raises(CheckpointError, match=r"1 of 1 layers stay, .*; recipe none takes every"):
        plan(save({"a.weight": torch.ones(64, 64)}), "int8")


@pytest.mark.parametrize(("fmt", "recipe"), [("int3", "auto"), ("int8", "flux")])
def test_unknown_names_are_refused_before_anything_is_read(wan, fmt, recipe):
    with pytest.raises(ValueError, match="unknown"):
        plan(Checkpoint(wan), fmt, recipe)


def test_tick_is_called_for_each_tensor_and_may_stop(wan):
    ticks = []
    work = plan(Checkpoint(wan), FORMAT)
    list(stream(work, tick=lambda: ticks.append(1)))
    assert len(ticks) >= len(work.steps)

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        next(stream(work, tick=stop))


def test_records_are_of_the_last_pass(wan):
    work = plan(Checkpoint(wan), FORMAT)
    for _ in range(2):
        list(stream(work))
    assert len({r.name for r in work.records}) == len(work.records)


def test_diffusers_named_wan_takes_the_host_s_names(tmp_path, wan, dense):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, ffn_dim=512, num_layers=1
    )
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    _, result = convert(Checkpoint(tmp_path), "int8")
    added = {n for n in result if n.endswith((".weight_scale", ".comfy_quant"))}
    assert set(result) - added == set(dense)
    assert {n: t.shape for n, t in result.items() if n in dense} == {
        n: t.shape for n, t in dense.items()
    }
    want = formats.get("int8").quantize(state["blocks.0.attn1.to_q.weight"])
    assert same(result["blocks.0.self_attn.q.weight"], want._qdata)
    assert same(result["head.modulation"], state["scale_shift_table"])
    assert same(result["blocks.0.norm3.weight"], state["blocks.0.norm2.weight"])
