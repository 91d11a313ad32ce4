"""Quantized layers as other programs mark them."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from lowbit.quant import formats
from lowbit.quant.checkpoint import Checkpoint, CheckpointError
from lowbit.quant.checkpoint.stored import marker_tensor, stored_layers

N, K = 48, 256
FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.fixture
def file(tmp_path):
    """A function (tensors, metadata) -> an open Checkpoint that holds them."""

    def write(tensors, metadata=None) -> Checkpoint:
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, tmp_path / "a.safetensors", metadata
        )
        return Checkpoint(tmp_path / "a.safetensors")

    return write


def layer(fmt: formats.Format, name: str = "m", weight: torch.Tensor = WEIGHT) -> dict:
    """Return the tensors of a layer of `fmt`, without a marking."""
    return {f"{name}.{part}": t for part, t in fmt.pack(fmt.quantize(weight)).items()}


def legacy(dtype=torch.float8_e4m3fn, scale_dtype=torch.float32, flag=1, prefix="") -> dict:
    """Return an FP8 layer as ComfyUI before 0.8 and WanVideoWrapper write it."""
    packed = formats.get(FP8[dtype]).pack(formats.get(FP8[dtype]).quantize(WEIGHT))
    return {
        f"{prefix}m.weight": packed["weight"],
        f"{prefix}m.scale_weight": packed["weight_scale"].to(scale_dtype),
        f"{prefix}m.bias": torch.zeros(N),
        f"{prefix}scaled_fp8": torch.empty(flag, dtype=dtype),
    }


def test_every_refusal_names_a_command(file):
    fp8 = WEIGHT.to(torch.float8_e4m3fn)
    for name, tensors in {
        "fp8_e4m3: weight_scale missing": {"m.weight": fp8},
        "weight_scale has shape": {"m.weight": fp8, "m.weight_scale": torch.ones(1, K)},
        "unknown format 'x'": {"m.weight": fp8, "m.comfy_quant": marker_tensor({"format": "x"})},
        "m is marked quantized but has no weight": {"n.weight": fp8},
    }.items():
        marker = marker_tensor({"format": "float8_e4m3fn"})
        expect_refused(file({"m.comfy_quant": marker} | tensors), f"{name}.*`lowbit quantize`")


def expect_refused(checkpoint: Checkpoint, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        for found in stored_layers(checkpoint).values():
            found.load(checkpoint)
    assert checkpoint.path in str(error.value)
    with pytest.raises(CheckpointError) as unread:
        for found in stored_layers(checkpoint).values():
            found.check(checkpoint)
    assert str(unread.value) == str(error.value)


@pytest.fixture(params=formats.names())
def fmt(request):
    return formats.get(request.param)


def test_layer_marked_by_a_tensor_is_read(file, fmt):
    checkpoint = file(
        layer(fmt) | {"m.comfy_quant": marker_tensor(fmt.marker), "m.bias": WEIGHT[0]}
    )
    (found,) = stored_layers(checkpoint).values()
    assert (found.name, found.format, found.marked_by) == ("m", fmt, "comfy_quant")
    assert found.marker == fmt.marker
    assert torch.equal(found.dequantize(checkpoint)[:N], fmt.quantize(WEIGHT).dequantize())
    assert found.load(checkpoint, torch.bfloat16).dtype == torch.bfloat16


def test_layer_marked_in_the_metadata_is_read(file, fmt):
    layers = {"format_version": "1.0", "layers": {"m": dict(fmt.marker)}}
    checkpoint = file(layer(fmt), {"_quantization_metadata": json.dumps(layers)})
    (found,) = stored_layers(checkpoint).values()
    assert (found.format, found.marked_by) == (fmt, "_quantization_metadata")
    assert torch.equal(found.dequantize(checkpoint)[:N], fmt.quantize(WEIGHT).dequantize())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("flag", [1, 2])
def test_legacy_fp8_is_read(file, dtype, flag, prefix):
    checkpoint = file(legacy(dtype, flag=flag, prefix=prefix))
    (found,) = stored_layers(checkpoint).values()
    fmt = formats.get(FP8[dtype])
    assert (found.name, found.format, found.marked_by) == (f"{prefix}m", fmt, "scaled_fp8")
    assert torch.equal(found.dequantize(checkpoint), fmt.quantize(WEIGHT).dequantize())


def test_legacy_flag_of_two_elements_asks_for_full_precision(file):
    (one,) = stored_layers(file(legacy(flag=1))).values()
    (two,) = stored_layers(file(legacy(flag=2))).values()
    assert one.marker == {"format": "float8_e4m3fn"}
    assert two.marker == {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def test_bf16_scales_are_multiplied_in_float32(file):
    """WanVideoWrapper's."""
    checkpoint = file(legacy(scale_dtype=torch.bfloat16))
    (found,) = stored_layers(checkpoint).values()
    stored, scale = checkpoint.read("m.weight"), checkpoint.read("m.scale_weight")
    assert torch.equal(found.dequantize(checkpoint), stored.float() * scale.float())


@pytest.mark.parametrize("name", ["input_scale", "scale_input"])
def test_scale_of_the_input_is_a_part_and_changes_no_value(file, name):
    checkpoint = file(legacy() | {f"m.{name}": torch.tensor(3.0)})
    (found,) = stored_layers(checkpoint).values()
    assert found.parts["input_scale"] == f"m.{name}"
    want = formats.get("fp8_e4m3").quantize(WEIGHT).dequantize()
    assert torch.equal(found.dequantize(checkpoint), want)


def test_unmarked_fp8_with_a_scale_is_read(file):
    checkpoint = file(layer(formats.get("fp8_e4m3")))
    (found,) = stored_layers(checkpoint).values()
    assert (found.format.name, found.marked_by) == ("fp8_e4m3", "nothing")


def test_unmarked_fp8_with_a_scale_per_row_is_read_as_such(file):
    """Read as one scale per tensor, such a file gives good-looking but unrelated pictures."""
    fmt = formats.get("fp8_e4m3_rowwise")
    checkpoint = file(layer(fmt))
    (found,) = stored_layers(checkpoint).values()
    assert found.format is fmt
    assert torch.equal(found.dequantize(checkpoint), fmt.quantize(WEIGHT).dequantize())


def test_dense_weights_and_unscaled_fp8_are_no_stored_layers(file):
    unscaled = WEIGHT.to(torch.float8_e4m3fn)
    tensors = {"m.weight": WEIGHT, "n.weight": unscaled, "n.bias": torch.zeros(N)}
    assert stored_layers(file(tensors)) == {}


def test_dense_weight_with_something_called_weight_scale_is_dense(file):
    assert stored_layers(file({"m.weight": WEIGHT, "m.weight_scale": torch.ones(())})) == {}


def test_smoothing_of_the_input_is_folded_in(file, fmt):
    """y = (x · s) Wᵀ = x (W · s)ᵀ with one s per input channel."""
    smooth = torch.linspace(0.5, 2, K)
    tensors = layer(fmt) | {"m.comfy_quant": marker_tensor(fmt.marker), "m.pre_quant_scale": smooth}
    checkpoint = file(tensors)
    (found,) = stored_layers(checkpoint).values()
    want = fmt.quantize(WEIGHT).dequantize() * smooth
    torch.testing.assert_close(found.dequantize(checkpoint)[:N], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_smoothing_by_one_value_is_of_all_columns(file, fmt, shape):
    """As the host has it, which multiplies the input by what the file holds."""
    tensors = layer(fmt) | {"m.comfy_quant": marker_tensor(fmt.marker)}
    checkpoint = file(tensors | {"m.pre_quant_scale": torch.full(shape, 0.25)})
    (found,) = stored_layers(checkpoint).values()
    assert torch.equal(found.dequantize(checkpoint)[:N], fmt.quantize(WEIGHT).dequantize() * 0.25)


PADDED = [name for name in formats.names() if formats.get(name).pad_multiple > 1]


@pytest.mark.parametrize("name", PADDED)
def test_rows_of_a_padded_weight_follow_from_the_bias(file, name):
    fmt = formats.get(name)
    odd = WEIGHT[:37]
    marker = {"m.comfy_quant": marker_tensor(fmt.marker)}
    (found,) = stored_layers(
        file(layer(fmt, weight=odd) | marker | {"m.bias": WEIGHT[0, :37]})
    ).values()
    assert found.shape == (37, K)
    (found,) = stored_layers(file(layer(fmt, weight=odd) | marker)).values()
    assert found.shape is None


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_recorded_shape_is_found_whatever_the_prefix(file, name, prefix):
    """Records bear the host's names, without the prefix of the file."""
    fmt = formats.get(name)
    odd = WEIGHT[:37, :100]
    tensors = layer(fmt, f"{prefix}blocks.0.m", odd)
    tensors[f"{prefix}blocks.0.m.comfy_quant"] = marker_tensor(fmt.marker)
    record = {"layers": {"blocks.0.m": {"format": name, "shape": [37, 100]}}}
    checkpoint = file(tensors, {"_lowbit": json.dumps(record)})
    (found,) = stored_layers(checkpoint).values()
    assert found.shape == (37, 100)
    assert torch.equal(found.dequantize(checkpoint), fmt.quantize(odd).dequantize())


@pytest.mark.parametrize("record", ["", "[]", "3", '{"layers": []}', '{"layers": {"m": 3}}'])
def test_malformed_record_is_no_record(file, record):
    fmt = formats.get("nvfp4")
    tensors = layer(fmt) | {"m.comfy_quant": marker_tensor(fmt.marker)}
    (found,) = stored_layers(file(tensors, {"_lowbit": record})).values()
    assert found.shape is None


def test_recorded_shape_that_cannot_be_is_refused(file):
    fmt = formats.get("nvfp4")
    tensors = layer(fmt) | {"m.comfy_quant": marker_tensor(fmt.marker)}
    record = {"layers": {"m": {"shape": [4096, 4096]}}}
    expect_refused(file(tensors, {"_lowbit": json.dumps(record)}), "layer m: .* weight holds")


@pytest.mark.parametrize(
    "text", [b"{", b"3", b"[]", b"\xff\xfe", b'{"format": "int3_future"}', b"{}"]
)
def test_marker_that_cannot_be_read_names_its_layer(file, text):
    marker = torch.tensor(list(text), dtype=torch.uint8)
    expect_refused(
        file({"m.weight": WEIGHT, "m.comfy_quant": marker}), r"\bm\b.*(JSON|unknown format)"
    )


@pytest.mark.parametrize(
    "marker",
    [
        torch.tensor(1.0),
        torch.zeros((), dtype=torch.uint8),
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.float32),
        torch.zeros(8, dtype=torch.int8),
    ],
    ids=lambda marker: f"{marker.dtype} {list(marker.shape)}",
)
def test_tensor_that_is_no_marker_is_refused(file, marker):
    checkpoint = file({"m.weight": WEIGHT, "m.comfy_quant": marker})
    dtype, shape = str(marker.dtype).removeprefix("torch."), list(marker.shape)
    expect_refused(checkpoint, rf"m\.comfy_quant is {dtype} {re.escape(str(shape))}, a marker is")


def test_fp8_weight_that_is_no_matrix_is_named(file):
    tensors = {"m.weight": torch.tensor(1.0).to(torch.float8_e4m3fn)}
    expect_refused(
        file(tensors | {"m.weight_scale": torch.ones(1, 1)}), r"layer m: .* this one \[\]"
    )


@pytest.mark.parametrize("shape", [(0,), (K + 1,), (2, K)])
def test_smoothing_of_another_width_is_refused(file, shape):
    """Said of the codebook of a W4A8 layer, too, that is called a smoothing."""
    fmt = formats.get("nvfp4")
    tensors = layer(fmt) | {"m.comfy_quant": marker_tensor(fmt.marker)}
    tensors["m.pre_quant_scale"] = torch.ones(shape)
    reason = rf"layer m: pre_quant_scale has shape .* each of the {K} columns"
    expect_refused(file(tensors), reason)


@pytest.mark.parametrize(
    "text",
    ["", "3", "{}", '{"layers": 3}', '{"layers": {"m": 3}}', "[" * 100_000],
    ids=lambda text: repr(text[:20]),
)
def test_malformed_metadata_is_refused(file, text):
    checkpoint = file({"m.weight": WEIGHT}, {"_quantization_metadata": text})
    expect_refused(checkpoint, "_quantization_metadata is malformed")


def test_marker_without_a_weight_is_refused(file):
    tensors = {"m.comfy_quant": marker_tensor({"format": "nvfp4"}), "n.weight": WEIGHT}
    expect_refused(file(tensors), "m is marked quantized but has no weight")


def test_quantized_weight_that_is_no_matrix_is_refused(file):
    tensors = layer(formats.get("fp8_e4m3"))
    tensors["m.weight"] = tensors["m.weight"].reshape(N, 16, 16)
    expect_refused(
        file(tensors), r"layer m: a quantized weight is \[N, K\], this one \[48, 16, 16\]"
    )


def test_missing_scale_names_its_layer(file, fmt):
    for part in fmt.scales.values():
        if part in fmt.optional:
            continue
        tensors = layer(fmt) | {"m.comfy_quant": marker_tensor(fmt.marker)}
        del tensors[f"m.{part}"]
        expect_refused(file(tensors), f"layer m: {fmt.name}: {part} missing")


def test_marker_tensor_is_json():
    marker = {"format": "nvfp4", "ü": True}
    assert json.loads(bytes(marker_tensor(marker).tolist())) == marker
    assert marker_tensor(marker).dtype == torch.uint8


@pytest.mark.parametrize("name", [n for n in formats.names() if formats.get(n).pad_multiple > 1])
@pytest.mark.parametrize("lacking", [1, 2])
def test_bias_that_would_cut_off_rows_is_refused(file, name, lacking):
    """Rows beyond the bias are padding only where the format pads to as many."""
    fmt = formats.get(name)
    rows = 2 * fmt.pad_multiple
    parts = layer(fmt, weight=torch.randn(rows, K)) | {"m.comfy_quant": marker_tensor(fmt.marker)}
    bias = torch.zeros(rows - lacking * fmt.pad_multiple)
    with pytest.raises(CheckpointError, match=rf"layer m: its bias has {len(bias)} elements"):
        stored_layers(file(parts | {"m.bias": bias}))
    (found,) = stored_layers(checkpoint := file(parts | {"m.bias": torch.zeros(rows - 1)})).values()
    assert found.logical_shape(checkpoint) == (rows - 1, K)


def test_metadata_names_without_the_files_prefix_are_found(tmp_path):
    path = tmp_path / "prefixed.safetensors"
    fmt = formats.get("int8")
    packed = fmt.pack(fmt.quantize(torch.randn(16, 32)))
    prefix = "model.diffusion_model.blocks.0.ffn.0"
    metadata = {"_quantization_metadata": json.dumps({"layers": {"blocks.0.ffn.0": fmt.marker}})}
    save_file({f"{prefix}.{p}": t for p, t in packed.items()}, path, metadata)
    assert list(stored_layers(Checkpoint(path))) == [prefix]


@pytest.mark.parametrize("width", [None, 0, 96])
def test_rotation_that_does_not_fit_is_refused_by_name(tmp_path, width):
    path = tmp_path / "rotated.safetensors"
    fmt = formats.get("int8_convrot")
    tensors = {f"a.{p}": t for p, t in fmt.pack(fmt.quantize(torch.randn(16, 256))).items()}
    tensors["a.comfy_quant"] = marker_tensor({**fmt.marker, "convrot_groupsize": width})
    save_file(tensors, path)
    checkpoint = Checkpoint(path)
    with pytest.raises(CheckpointError, match="layer a"):
        stored_layers(checkpoint)["a"].load(checkpoint)
