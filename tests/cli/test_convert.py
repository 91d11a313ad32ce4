"""`lowbit convert`: a file of another program becomes ComfyUI's, or is refused by name."""

import pytest
import torch
from safetensors.torch import load_file

from lowbit.quant import formats
from lowbit.quant.checkpoint import Checkpoint
from lowbit.quant.checkpoint.stored import marker_tensor
from tests import foreign
from tests.cli import files


def made(tensors, layer):
    """The tensors with the linear layers of the blocks as `layer(weight)` has them."""
    result = dict(tensors)
    for name in files.linear_names(tensors):
        parts = layer(result.pop(f"{name}.weight").float())
        result |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return result


def tiled(weight):
    stored, scale = foreign.tiled(weight, 64)
    marker = marker_tensor({"format": "float8_e4m3fn_blockwise", "group_size": 64})
    return {"weight": stored, "weight_scale": scale, "comfy_quant": marker}


def per_row_marked_per_tensor(weight):
    marker = marker_tensor({"format": "float8_e4m3fn"})
    return foreign.packed("fp8_e4m3_rowwise", weight) | {"comfy_quant": marker}


@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (foreign.modelopt, ("--from", "modelopt")),
        (foreign.lightx2v, ()),
        (lambda w: foreign.packed("nvfp4", w), ("--from", "nvfp4")),
        (lambda w: foreign.packed("nvfp4", w), ("--scales", "swizzled")),
    ],
    ids=["modelopt", "lightx2v", "unmarked", "by its scales"],
)
def test_nvfp4_of_every_program_becomes_the_same_file(
    lowbit, lowbit_json, tensors, tmp_path, layer, arguments
):
    source = files.saved(tmp_path / "source.safetensors", made(tensors, layer))
    target = tmp_path / "target.safetensors"
    code, out, err = lowbit("convert", source, target, *arguments)
    assert code == 0, err
    assert "nvfp4" in out
    code, report = lowbit_json("inspect", target)
    assert (code, report["formats"]["nvfp4"]["count"]) == (0, 10)
    want, got = files.marked(tensors, "nvfp4"), load_file(target)
    assert {n for n in got if not n.endswith("input_scale")} == set(want)
    for name, tensor in want.items():
        if name.endswith("weight_scale_2"):
            torch.testing.assert_close(got[name], tensor)
        elif tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
        else:
            assert torch.equal(got[name], tensor), name


def test_what_is_ambiguous_is_refused_naming_the_command(lowbit, tensors, tmp_path):
    """Random weights show no order; loading, quantizing and converting say so alike."""
    source = files.saved(tmp_path / "source.safetensors", made(tensors, foreign.modelopt))
    for command in ("convert", "quantize"):
        more = ["--format", "int8"] if command == "quantize" else []
        code, out, err = lowbit(command, source, tmp_path / "target.safetensors", *more)
        assert code == 2 and not out
        assert f"`lowbit convert {source} DST` with `--from modelopt` or `--from nvfp4`" in err
    assert [p.name for p in tmp_path.iterdir()] == ["source.safetensors"]
    code, out, _ = lowbit("inspect", source)
    assert code == 1
    assert "error in LowBit: ambiguous_layout" in out


def test_what_is_not_ambiguous_is_quantized_as_it_is(lowbit_json, tensors, tmp_path):
    source = files.saved(tmp_path / "source.safetensors", made(tensors, foreign.lightx2v))
    code, result = lowbit_json("quantize", source, tmp_path / "t.safetensors", "--format", "int8")
    assert code == 0
    assert result["mean_error"] < formats.get("int8").max_error


def test_numbers_that_no_format_holds_are_quantized_again_and_their_error_is_told(
    lowbit_json, tensors, tmp_path
):
    source = files.saved(tmp_path / "source.safetensors", made(tensors, tiled))
    target = tmp_path / "target.safetensors"
    code, result = lowbit_json("convert", source, target)
    assert code == 0
    again = [r for r in result["layers"] if r["format"]]
    assert {r["reason"] for r in again} == {"no format holds convert_to_quant's numbers"}
    assert all(0 < r["error"] < formats.get("int8_convrot").max_error for r in again)
    assert lowbit_json("inspect", target)[1]["formats"]["int8_convrot"]["count"] == 10
    code, result = lowbit_json("convert", source, target, "--overwrite", "--format", "mxfp8")
    assert {r["format"] for r in result["layers"]} == {"mxfp8", None}


def test_scales_per_row_get_the_marking_that_they_need(lowbit_json, tensors, tmp_path):
    source = files.saved(tmp_path / "source.safetensors", made(tensors, per_row_marked_per_tensor))
    target = tmp_path / "target.safetensors"
    code, result = lowbit_json("convert", source, target)
    assert code == 0
    assert {r["error"] for r in result["layers"]} == {None}
    _, report = lowbit_json("inspect", target)
    assert report["formats"]["fp8_e4m3_rowwise"]["count"] == 10
    assert [(p["code"], p["affects"]) for p in report["problems"]] == [
        ("unknown_format", ["ComfyUI"])
    ]


def test_legacy_fp8_gets_markings_and_the_hosts_names(lowbit_json, tensors, tmp_path):
    source = files.saved(
        tmp_path / "source.safetensors", files.legacy_fp8(tensors, torch.bfloat16, flag=False)
    )
    target = tmp_path / "target.safetensors"
    assert lowbit_json("convert", source, target)[0] == 0
    code, report = lowbit_json("inspect", target)
    assert (code, report["formats"]["fp8_e4m3"]["count"]) == (0, 10)
    before, after = Checkpoint(source), Checkpoint(target)
    name = files.linear_names(tensors)[0]
    assert "scaled_fp8" not in after
    assert torch.equal(
        before.read(f"{name}.weight").float() * before.read(f"{name}.scale_weight").float(),
        after.read(f"{name}.weight").float() * after.read(f"{name}.weight_scale"),
    )


def test_file_without_quantized_layers_is_left_to_quantize(lowbit, wan, tmp_path):
    code, _, err = lowbit("convert", wan, tmp_path / "target.safetensors")
    assert code == 2
    assert "no layer of it is quantized; `lowbit quantize` does that" in err


def test_unknown_program_is_refused_with_the_known_ones(lowbit, wan, tmp_path):
    code, _, err = lowbit("convert", wan, tmp_path / "target.safetensors", "--from", "nobody")
    assert code == 2
    assert "--from nobody: unknown; known are" in err and "lightx2v" in err
