"""What the user says of a file: who wrote it, and in which order its scales lie."""

import pytest
import torch

from lowbit.quant.checkpoint import Checkpoint, CheckpointError
from lowbit.quant.checkpoint.foreign import AmbiguousError, Request
from lowbit.quant.checkpoint.stored import marker_tensor, stored_layers
from lowbit.quant.convert_file import convert_file
from lowbit.quant.inspect_file import inspect_file
from tests import foreign
from tests.quant.dialects.conftest import marked, repacked, same_bits


def test_request_that_fits_no_layer_is_refused(opened):
    checkpoint = opened({"m": {"weight": foreign.even(16, 16)}})
    with pytest.raises(CheckpointError, match="no layer of it is as lightx2v writes it"):
        stored_layers(checkpoint, Request("lightx2v"))


@pytest.mark.parametrize("beside", ["int8", "int8_convrot"])
def test_who_wrote_some_layers_leaves_others_to_what_they_show(opened, tmp_path, beside):
    """A file of two unmarked layouts, of which one has to be said."""
    weight = foreign.patterned()
    layers = {
        "blocks.0.ffn.0": foreign.modelopt(weight),
        "blocks.0.ffn.2": foreign.packed(beside, weight),
        "blocks.0.self_attn.q": foreign.packed("fp8_e4m3", weight),
    }
    checkpoint = opened(layers)
    with pytest.raises(AmbiguousError, match=rf"ffn\.2: .* `--from {beside}`"):
        stored_layers(checkpoint)
    found = stored_layers(checkpoint, Request(beside))
    by = {name: layer.marked_by for name, layer in found.items()}
    assert by == {
        "blocks.0.ffn.0": "modelopt",
        "blocks.0.ffn.2": beside,
        "blocks.0.self_attn.q": "nothing",
    }
    same_bits(repacked(found["blocks.0.ffn.0"], checkpoint), foreign.packed("nvfp4", weight))
    convert_file(checkpoint.path, target := tmp_path / "target.safetensors", dialect=beside)
    assert not inspect_file(target).errors
    # That other layers can be read does not make them the program's that is named.
    with pytest.raises(CheckpointError, match="no layer of it is as lightx2v writes it"):
        stored_layers(checkpoint, Request("lightx2v"))


def test_order_of_a_programs_layers_is_not_that_of_a_format_that_shows_another(opened, tmp_path):
    """`modelopt` could have written either format; one shows that its order is the host's."""
    weight = foreign.patterned()
    right, wrong = foreign.packed("nvfp4", weight), foreign.packed("mxfp8", weight)
    wrong = wrong | {"weight_scale": foreign.flat_scales("mxfp8", weight, wrong)}
    layers = {f"blocks.0.{n}": marked("nvfp4", right) for n in ("self_attn.q", "self_attn.k")}
    layers |= {f"blocks.0.{n}": marked("mxfp8", wrong) for n in ("ffn.0", "ffn.2")}
    checkpoint = opened(layers)
    with pytest.raises(
        AmbiguousError, match="DST` with `--from mxfp8 --scales flat` or `--from mo"
    ):
        stored_layers(checkpoint)
    for dialect in ("mxfp8", "modelopt"):
        target = tmp_path / f"{dialect}.safetensors"
        convert_file(checkpoint.path, target, dialect=dialect, order="flat")
        found = stored_layers(written := Checkpoint(target))
        same_bits(repacked(found["blocks.0.self_attn.q"], written), right)
        same_bits(repacked(found["blocks.0.ffn.0"], written), foreign.packed("mxfp8", weight))


def test_order_that_is_asked_of_the_format_itself_holds_whatever_its_scales_show(opened):
    weight = foreign.patterned()
    layers = {"a": foreign.modelopt(weight), "b": marked("mxfp8", foreign.packed("mxfp8", weight))}
    found = stored_layers(opened(layers), Request("mxfp8", "flat"))
    assert found["b"].reading is not None
    notes: list[str] = []
    stored_layers(opened(layers), Request("modelopt", "flat"), notes)
    assert any("1 layers are read as they are marked" in note for note in notes)


def test_numbers_that_are_marked_as_mxfp8_are_refused_for_what_they_are(opened):
    packed = foreign.packed("mxfp8", foreign.patterned())
    packed["weight"] = packed["weight"].view(torch.int8)
    checkpoint = opened({"b": marked("mxfp8", packed)})
    found = stored_layers(checkpoint)["b"]
    assert found.reading is None
    with pytest.raises(ValueError, match=r"weight is torch.int8, torch.float8_e4m3fn is wanted"):
        repacked(found, checkpoint)


def test_order_of_a_programs_unmarked_layers_is_not_that_of_marked_ones(opened):
    weight = foreign.patterned()
    ours = foreign.packed("mxfp8", weight)
    layers = {"a": foreign.modelopt(weight), "b": marked("mxfp8", ours)}
    found = stored_layers(checkpoint := opened(layers), Request("modelopt", "flat"))
    assert found["a"].marked_by == "modelopt" and found["b"].reading is None
    same_bits(repacked(found["a"], checkpoint), foreign.packed("nvfp4", weight))
    same_bits(repacked(found["b"], checkpoint), ours)


def test_who_wrote_some_layers_leaves_marked_ones_to_what_they_show(opened):
    weight = foreign.patterned()
    rows = foreign.packed("fp8_e4m3_rowwise", weight)
    rows["weight_scale"] = rows["weight_scale"].reshape(-1)
    rows["comfy_quant"] = marker_tensor({"format": "float8_e4m3fn"})
    checkpoint = opened({"rows": rows, "m": foreign.packed("int8", weight)})
    found = stored_layers(checkpoint, Request("int8"))
    assert {n: x.marked_by for n, x in found.items()} == {"rows": "convert_to_quant", "m": "int8"}
