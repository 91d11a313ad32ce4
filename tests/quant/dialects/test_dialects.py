"""Layers of other programs: told apart, read bit for bit, or refused with the command."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.quant import compare, dialects, formats
from lowbit.quant.checkpoint import Checkpoint, CheckpointError
from lowbit.quant.checkpoint.foreign import AmbiguousError, Request
from lowbit.quant.checkpoint.stored import AS_IT_IS, marker_tensor, stored_layers
from lowbit.quant.convert_file import convert_file
from lowbit.quant.inspect_file import inspect_file
from lowbit.quant.model import load_model
from lowbit.quant.quantize_file import quantize_file
from tests import foreign
from tests.quant.dialects.conftest import repacked, same_bits

OF_MODELOPT = {"quantization_config": json.dumps({"quant_method": "modelopt"})}
BLOCKS = sorted(foreign.GROUPS)


@pytest.mark.parametrize("rows", [256, 192, 24])
@pytest.mark.parametrize("columns", [1024, 32, 96])
@pytest.mark.parametrize("name", BLOCKS)
def test_modelopts_layer_is_the_hosts_bit_for_bit(opened, name, rows, columns):
    weight = foreign.patterned(rows, columns)
    checkpoint = opened({"m": foreign.modelopt(weight, name)}, OF_MODELOPT)
    (found,) = stored_layers(checkpoint).values()
    want = foreign.packed(name, weight)
    same_bits(repacked(found, checkpoint), want)
    fmt = formats.get(name)
    assert torch.equal(found.dequantize(checkpoint), fmt.quantize(weight).dequantize())
    assert (found.format, found.marked_by) == (fmt, "modelopt")
    assert found.logical_shape(checkpoint) == (rows, columns)


@pytest.mark.parametrize("rows", [256, 192, 24])
@pytest.mark.parametrize("calibrated", [True, False])
def test_lightx2vs_layer_is_the_hosts(opened, rows, calibrated):
    weight = foreign.patterned(rows, 1024)
    checkpoint = opened({"m": foreign.lightx2v(weight, calibrated)})
    (found,) = stored_layers(checkpoint).values()
    want = foreign.packed("nvfp4", weight)
    got = found.tensors(checkpoint)
    # Two divisions of float32 lie between the tensor scales.
    torch.testing.assert_close(got.pop("weight_scale_2"), want.pop("weight_scale_2"))
    torch.testing.assert_close(got.pop("input_scale"), torch.tensor(5.0 / foreign.GLOBAL_RANGE))
    same_bits(got, want)


@pytest.mark.parametrize("name", BLOCKS)
def test_size_of_the_scales_tells_the_order_of_the_whole_file(opened, name):
    """One layer whose scales take padding is enough, for those that show nothing too."""
    plain, telling = foreign.even(256, 1024), foreign.even(96, 1024)
    layers = {"a": foreign.modelopt(plain, name), "b": foreign.modelopt(telling, name)}
    checkpoint = opened(layers)
    notes = []
    found = stored_layers(checkpoint, notes=notes)
    assert {layer.marked_by for layer in found.values()} == {"modelopt"}
    assert notes == ["block scales are not swizzled: b has as many as without padding"]
    same_bits(repacked(found["a"], checkpoint), foreign.packed(name, plain))


@pytest.mark.parametrize("name", BLOCKS)
def test_pattern_of_trained_weights_tells_the_order(opened, name):
    weight = foreign.patterned()
    for made, dialect in (
        (foreign.modelopt(weight, name), "modelopt"),
        (foreign.packed(name, weight), name),
    ):
        checkpoint = opened({"m": made})
        notes = []
        (found,) = stored_layers(checkpoint, notes=notes).values()
        assert found.marked_by == dialect
        same_bits(repacked(found, checkpoint), foreign.packed(name, weight))
        assert "standard deviations above chance" in notes[0]


@pytest.mark.parametrize("name", BLOCKS)
def test_layer_that_shows_no_order_is_refused_with_both_commands(opened, name):
    weight = foreign.even()
    checkpoint = opened({"m": foreign.modelopt(weight, name)})
    with pytest.raises(CheckpointError) as error:
        stored_layers(checkpoint)
    message = str(error.value)
    assert f"lowbit convert '{checkpoint.path}' DST" in message
    assert "`--from modelopt` or " in message and f"`--from {name}`" in message
    (found,) = stored_layers(checkpoint, Request("modelopt")).values()
    same_bits(repacked(found, checkpoint), foreign.packed(name, weight))


def test_configuration_beside_shards_tells_the_order(tmp_path):
    weight = foreign.even()
    tensors = {f"m.{p}": t.contiguous() for p, t in foreign.modelopt(weight).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path)
    (found,) = stored_layers(checkpoint).values()
    same_bits(repacked(found, checkpoint), foreign.packed("nvfp4", weight))


def test_request_for_scales_alone_is_enough_where_it_tells(opened):
    weight = foreign.even()
    checkpoint = opened({"m": foreign.modelopt(weight)})
    (found,) = stored_layers(checkpoint, Request(order="flat")).values()
    assert found.marked_by == "modelopt"
    (found,) = stored_layers(checkpoint, Request(order="swizzled")).values()
    assert found.marked_by == "nvfp4"


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_tells_of_scales_that_are_swizzled_twice(opened, name):
    weight = foreign.even(160, 1024)
    bad = foreign.twice(foreign.packed(name, weight))
    bad["comfy_quant"] = marker_tensor(formats.get(name).marker)
    with pytest.raises(CheckpointError, match=f"--from {name} --scales twice"):
        stored_layers(opened({"m": bad}))


@pytest.mark.parametrize("name", BLOCKS)
def test_order_is_not_questioned_in_files_of_ours(opened, name):
    """Who asked for an order by `--scales` has the last word over a heuristic."""
    parts = foreign.twice(foreign.packed(name, foreign.patterned()))
    parts["comfy_quant"] = marker_tensor(formats.get(name).marker)
    (found,) = stored_layers(opened({"m": parts}, {"_lowbit": "{}"})).values()
    assert found.reading is None


def test_layers_in_different_orders_are_refused(opened):
    layers = {
        "a": foreign.modelopt(foreign.even(96, 1024)),
        "b": foreign.packed("nvfp4", foreign.even(96, 1024)),
    }
    with pytest.raises(CheckpointError, match="a and b lie in different orders"):
        stored_layers(opened(layers))


@pytest.mark.parametrize("order", ["flat", "twice"])
@pytest.mark.parametrize("name", BLOCKS)
def test_marking_with_scales_in_another_order_is_refused_and_repaired_if_asked(opened, name, order):
    weight = foreign.patterned()
    parts = foreign.packed(name, weight)
    if order == "flat":
        bad = {**parts, "weight_scale": foreign.flat_scales(name, weight, parts)}
    else:
        bad = foreign.twice(parts)
    bad["comfy_quant"] = marker_tensor(formats.get(name).marker)
    checkpoint = opened({"m": bad})
    with pytest.raises(CheckpointError, match=f"--from {name} --scales {order}"):
        stored_layers(checkpoint)
    (found,) = stored_layers(checkpoint, Request(name, order)).values()
    same_bits(repacked(found, checkpoint), parts)
    assert found.marker["format"] == formats.get(name).marker["format"]


@pytest.mark.parametrize("name", ["int8", "int8_convrot"])
def test_integers_with_a_flat_list_of_scales_are_read_if_named(opened, name):
    weight = foreign.even(64, 256)
    parts = foreign.packed(name, weight)
    bad = {**parts, "weight_scale": parts["weight_scale"].reshape(-1)}
    checkpoint = opened({"m": bad})
    (found,) = stored_layers(checkpoint, Request(name)).values()
    same_bits(repacked(found, checkpoint), parts)


def test_lightx2vs_mxfp8_is_read_if_named(opened):
    weight = foreign.even()
    parts = foreign.packed("mxfp8", weight)
    checkpoint = opened({"m": parts})
    with pytest.raises(CheckpointError, match="`--from lightx2v`"):
        stored_layers(checkpoint)
    (found,) = stored_layers(checkpoint, Request("lightx2v")).values()
    same_bits(repacked(found, checkpoint), parts)


@pytest.mark.parametrize("name", ["int8", "int8_convrot", "convrot_w4a4"])
def test_integers_without_a_marking_are_refused_naming_what_they_may_be(opened, name):
    weight = foreign.even(64, 256)
    checkpoint = opened({"m": foreign.packed(name, weight)})
    with pytest.raises(CheckpointError, match=f"`--from {name}`"):
        stored_layers(checkpoint)
    (found,) = stored_layers(checkpoint, Request(name)).values()
    assert found.format is formats.get(name)
    assert torch.equal(
        found.dequantize(checkpoint), formats.get(name).quantize(weight).dequantize()
    )


def test_integers_in_no_known_layout_are_refused(opened):
    layer = {"weight": torch.zeros(8, 8, dtype=torch.int8), "weight_scale": torch.ones(3)}
    with pytest.raises(CheckpointError, match="in no layout that LowBit reads"):
        stored_layers(opened({"m": layer}))


def test_scale_that_nobody_reads_is_refused(opened):
    layer = {"weight": torch.ones(256, 256).to(torch.float8_e4m3fn)}
    layer["weight_scale_inv"] = torch.ones(2, 2)
    with pytest.raises(CheckpointError, match=r"weight_scale_inv float32 \[2, 2\] is in no layout"):
        stored_layers(opened({"m": layer}))


@pytest.mark.parametrize("shape", [(64,), (64, 1), (64, 1, 1), (1, 64), (1, 64, 1)])
@pytest.mark.parametrize("columns", [64, 256])
@pytest.mark.parametrize("marked", [True, False])
def test_fp8_scale_per_row_is_read_as_one_whatever_its_marking(opened, shape, columns, marked):
    """Read as one scale per tensor, such a file gives good-looking but unrelated pictures.

    So does [1, N] read as one scale per column, which it could be where N divides K.
    """
    weight = foreign.patterned(64, columns)
    square_line = shape[0] == 1 and columns == 64
    parts = foreign.packed("fp8_e4m3_rowwise", weight)
    bad = {**parts, "weight_scale": parts["weight_scale"].reshape(shape)}
    if marked:
        bad["comfy_quant"] = marker_tensor({"format": "float8_e4m3fn"})
    checkpoint = opened({"m": bad})
    request = Request("convert_to_quant") if square_line else AS_IT_IS
    (found,) = stored_layers(checkpoint, request).values()
    assert found.format.name == "fp8_e4m3_rowwise"
    assert found.marker["format"] == "float8_e4m3fn_rowwise"
    same_bits(repacked(found, checkpoint), parts)


def in_a_line(weight, of, dtype):
    """A layer with a scale for each row, or each column, all in one line."""
    scale = weight.abs().amax(1 if of == "rows" else 0)
    scale = scale / (127.0 if dtype == torch.int8 else torch.finfo(dtype).max)
    stored = weight / (scale[:, None] if of == "rows" else scale)
    stored = stored.round() if dtype == torch.int8 else stored
    name = {torch.int8: "int8_tensorwise", torch.float8_e4m3fn: "float8_e4m3fn"}[dtype]
    marker = marker_tensor({"format": name})
    return {"weight": stored.to(dtype), "weight_scale": scale[None], "comfy_quant": marker}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("of", ["rows", "columns"])
def test_scales_in_one_line_beside_a_square_weight_are_told_by_other_layers(opened, of, dtype):
    square = foreign.patterned(64, 64)
    alone = {"blocks.0.self_attn.q": in_a_line(square, of, dtype)}
    checkpoint = opened(alone)
    command = f"If of a row, .*`lowbit convert '{checkpoint.path}' DST` with `--from convert_to_q"
    with pytest.raises(AmbiguousError, match=command):
        stored_layers(checkpoint)
    (found,) = stored_layers(checkpoint, Request("convert_to_quant")).values()
    assert torch.equal(
        found.tensors(checkpoint)["weight_scale"], alone[found.name]["weight_scale"].T
    )
    if dtype == torch.float8_e4m3fn:
        marker = marker_tensor({"format": "float8_e4m3fn_rowwise"})
        (said,) = stored_layers(
            opened({"m": {**alone[found.name], "comfy_quant": marker}})
        ).values()
        assert said.format.name == "fp8_e4m3_rowwise"
    telling = {"blocks.0.ffn.0": in_a_line(foreign.patterned(128, 64), of, dtype)}
    checkpoint = opened(alone | telling)
    found = stored_layers(checkpoint)
    if of == "rows":
        error = compare.relative_error(found["blocks.0.self_attn.q"].dequantize(checkpoint), square)
        assert error < 2 * formats.get("fp8_e4m3_rowwise").max_error
    else:
        with pytest.raises(CheckpointError, match=r"self_attn\.q: .* `lowbit quantize`"):
            found["blocks.0.self_attn.q"].check(checkpoint)


@pytest.mark.parametrize("shape", [(128,), (128, 1), (1, 128)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_of_rows_in_any_shape_tell_of_those_in_one_line(opened, dtype, shape):
    square = foreign.patterned(64, 64)
    telling = in_a_line(foreign.patterned(128, 64), "rows", dtype)
    telling["weight_scale"] = telling["weight_scale"].reshape(shape)
    checkpoint = opened({"a": in_a_line(square, "rows", dtype), "b": telling})
    found = stored_layers(checkpoint)["a"]
    error = compare.relative_error(found.dequantize(checkpoint), square)
    assert error < 2 * formats.get("fp8_e4m3_rowwise").max_error


@pytest.mark.parametrize("beside", ["text_encoders.llm.ffn", "model.diffusion_model.ffn"])
def test_scales_of_another_model_or_payload_tell_nothing(opened, beside):
    """Only layers that are alike were written in one way."""
    of_model = beside.startswith("model.")
    other = torch.int8 if of_model else torch.float8_e4m3fn
    attention = in_a_line(foreign.patterned(64, 64), "rows", torch.float8_e4m3fn)
    layers = {
        "model.diffusion_model.attn": attention,
        beside: in_a_line(foreign.patterned(128, 64), "columns", other),
    }
    with pytest.raises(AmbiguousError, match=r"attn: .* of a row or of a column"):
        stored_layers(opened(layers))
    row = in_a_line(foreign.patterned(128, 64), "rows", torch.float8_e4m3fn)
    found = stored_layers(opened(layers | {"model.diffusion_model.out": row}))
    assert found["model.diffusion_model.attn"].format.name == "fp8_e4m3_rowwise"


def test_rotated_square_weight_has_scales_of_rows(opened):
    """By what its format is, in whatever shape they lie."""
    parts = foreign.packed("int8_convrot", foreign.patterned(256, 256))
    marker = {"comfy_quant": marker_tensor(formats.get("int8_convrot").marker)}
    line = {**parts, "weight_scale": parts["weight_scale"].reshape(1, -1)}
    checkpoint = opened({"m": line | marker})
    (found,) = stored_layers(checkpoint).values()
    assert found.format.name == "int8_convrot"
    same_bits(repacked(found, checkpoint), parts)


@pytest.mark.parametrize("shape", [(64,), (64, 1), (1, 64)])
@pytest.mark.parametrize("marking", [None, "float8_e5m2", "float8_e5m2_rowwise"])
def test_e5m2_scale_per_row_is_read_by_its_values(opened, tmp_path, shape, marking):
    weight = foreign.patterned(64, 256)
    scale = weight.abs().amax(1) / torch.finfo(torch.float8_e5m2).max
    stored = (weight / scale[:, None]).to(torch.float8_e5m2)
    parts = {"weight": stored, "weight_scale": scale.reshape(shape)}
    if marking:
        parts["comfy_quant"] = marker_tensor({"format": marking})
    checkpoint = opened({"blocks.0.ffn.0": parts})
    (found,) = stored_layers(checkpoint).values()
    assert torch.equal(found.dequantize(checkpoint), stored.float() * scale[:, None])
    with pytest.raises(CheckpointError, match="cannot stay as stored: choose a format"):
        load_model(checkpoint.path, torch.nn.Module())
    target = tmp_path / "target.safetensors"
    (record,) = convert_file(checkpoint.path, target).records
    assert record.format == "int8_convrot"


@pytest.mark.parametrize("shape", [(64,), (1, 64)])
@pytest.mark.parametrize("name", ["int8", "int8_convrot"])
def test_int8_scale_per_row_of_another_shape_keeps_its_marking(opened, name, shape):
    weight = foreign.patterned(64, 256)
    fmt = formats.get(name)
    parts = foreign.packed(name, weight)
    marker = {**fmt.marker, "full_precision_matrix_mult": True}
    bad = {**parts, "weight_scale": parts["weight_scale"].reshape(shape)}
    checkpoint = opened({"m": bad | {"comfy_quant": marker_tensor(marker)}})
    (found,) = stored_layers(checkpoint).values()
    assert (found.format, found.marker) == (fmt, marker)
    same_bits(repacked(found, checkpoint), parts)


def test_hybrid_mxfp8_is_mxfp8(opened):
    weight = foreign.patterned(64, 256)
    parts = foreign.packed("mxfp8", weight)
    marker = marker_tensor({"format": "hybrid_mxfp8", "group_size": 32})
    checkpoint = opened({"m": {**parts, "weight_scalar": torch.ones(()), "comfy_quant": marker}})
    (found,) = stored_layers(checkpoint).values()
    assert found.format.name == "mxfp8"
    same_bits(repacked(found, checkpoint), parts)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float8_e4m3fn_blockwise", torch.float8_e4m3fn), ("int8_blockwise", torch.int8)],
)
def test_tiles_are_read_by_their_values(opened, name, dtype):
    weight = foreign.patterned(128, 256)
    stored, scale = foreign.tiled(weight, 64, dtype)
    marker = marker_tensor({"format": name, "group_size": 64})
    checkpoint = opened({"m": {"weight": stored, "weight_scale": scale, "comfy_quant": marker}})
    (found,) = stored_layers(checkpoint).values()
    assert found.format is None and found.title == "convert_to_quant's"
    want = stored.float() * scale.repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert torch.equal(found.dequantize(checkpoint), want)


def test_groups_of_columns_under_a_marking_for_one_scale_are_read_by_their_values(opened):
    stored = foreign.even(64, 256).to(torch.float8_e4m3fn)
    scale = foreign.even(64, 4).abs()
    marker = marker_tensor({"format": "float8_e4m3fn"})
    parts = {"weight": stored, "weight_scale": scale[:, :, None], "comfy_quant": marker}
    checkpoint = opened({"m": parts})
    (found,) = stored_layers(checkpoint).values()
    want = stored.float() * scale.repeat_interleave(64, 1)
    assert torch.equal(found.dequantize(checkpoint), want)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (128, 4), (128, 4, 1)])
def test_tile_that_is_whole_square_or_of_one_row_needs_no_marking(opened, shape):
    stored = foreign.even(128, 256).to(torch.float8_e4m3fn)
    scale = foreign.even(128, 4)[: shape[0], : shape[1]].abs().reshape(shape)
    marker = marker_tensor({"format": "float8_e4m3fn_rowwise"})
    checkpoint = opened({"m": {"weight": stored, "weight_scale": scale, "comfy_quant": marker}})
    (found,) = stored_layers(checkpoint).values()
    flat = scale.reshape(shape[:2])
    rows, columns = 128 // shape[0], 256 // shape[1]
    want = stored.float() * flat.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    assert torch.equal(found.dequantize(checkpoint), want)


@pytest.mark.parametrize("shape", [(64, 1), (2, 2), (1, 256), (16, 256)])
@pytest.mark.parametrize(
    ("name", "dtype"), [("float8_e4m3fn", torch.float8_e4m3fn), ("int8_tensorwise", torch.int8)]
)
def test_tile_of_a_shape_that_nobody_writes_is_refused(opened, name, dtype, shape):
    """That the shape of the scales divides the weight's proves nothing."""
    stored = (foreign.even(128, 256) * 50).to(dtype)
    layer = {"weight": stored, "weight_scale": torch.ones(shape)}
    checkpoint = opened({"m": {**layer, "comfy_quant": marker_tensor({"format": name})}})
    (found,) = stored_layers(checkpoint).values()
    with pytest.raises(CheckpointError, match=r"layer m: \w+: weight_scale has shape"):
        found.check(checkpoint)


def test_one_row_of_scales_is_of_tiles_if_the_marking_says_so(opened):
    stored, scale = foreign.tiled(foreign.patterned(16, 256), 16)
    marker = marker_tensor({"format": "float8_e4m3fn_blockwise", "group_size": 16})
    checkpoint = opened({"m": {"weight": stored, "weight_scale": scale, "comfy_quant": marker}})
    (found,) = stored_layers(checkpoint).values()
    assert found.format is None
    want = stored.float() * scale.repeat_interleave(16, 1)
    assert torch.equal(found.dequantize(checkpoint), want)


def test_rotated_tiles_are_refused(opened):
    stored, scale = foreign.tiled(foreign.even(128, 256), 64, torch.int8)
    marker = marker_tensor({"format": "int8_blockwise", "convrot": True})
    checkpoint = opened({"m": {"weight": stored, "weight_scale": scale, "comfy_quant": marker}})
    with pytest.raises(CheckpointError, match="unknown format 'int8_blockwise'"):
        stored_layers(checkpoint)


def test_smoothing_is_folded_in(opened):
    weight, smooth = foreign.patterned(), torch.linspace(0.5, 2, 1024)
    checkpoint = opened({"m": foreign.modelopt(weight) | {"pre_quant_scale": smooth}})
    (found,) = stored_layers(checkpoint).values()
    want = formats.get("nvfp4").quantize(weight).dequantize() * smooth
    assert torch.equal(found.dequantize(checkpoint), want)


ODD = {
    "alpha": lambda w: foreign.lightx2v(w),
    "input_global_scale": lambda w: foreign.lightx2v(w),
    "weight_global_scale": lambda w: foreign.lightx2v(w, calibrated=False),
    "input_absmax": lambda w: foreign.lightx2v(w, calibrated=False),
    "weight_scale_2": lambda w: foreign.modelopt(w),
    "input_scale": lambda w: foreign.modelopt(w),
}


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("part", ODD)
def test_tensor_scale_that_is_not_one_value_is_named_by_whoever_reads_it(
    opened, tmp_path, part, count
):
    layer = ODD[part](foreign.patterned(64, 256)) | {part: torch.ones(count)}
    checkpoint = opened({"blocks.0.ffn.0": layer})
    match = rf"a file\.safetensors: layer blocks\.0\.ffn\.0: {part} has shape \[{count}\]"
    with pytest.raises(CheckpointError, match=match):
        stored_layers(checkpoint)
    target = tmp_path / "target.safetensors"
    with pytest.raises(CheckpointError, match=match):
        convert_file(checkpoint.path, target)
    with pytest.raises(CheckpointError, match=match):
        quantize_file(checkpoint.path, target, "fp8_e4m3", recipe_name="none")
    with pytest.raises(CheckpointError, match=match):
        load_model(checkpoint.path, torch.nn.Module())
    assert not target.exists()
    assert inspect_file(checkpoint.path).errors


def test_tensor_scale_of_one_element_has_any_shape(opened):
    weight = foreign.patterned(64, 256)
    parts = foreign.lightx2v(weight)
    parts |= {part: parts[part].reshape(1) for part in ("alpha", "input_global_scale")}
    checkpoint = opened({"m": parts})
    (found,) = stored_layers(checkpoint).values()
    assert found.tensors(checkpoint)["weight_scale_2"].shape == ()


def test_names_are_the_programs_and_the_formats():
    assert set(dialects.names()) == {"modelopt", "lightx2v", "convert_to_quant", *formats.names()}
