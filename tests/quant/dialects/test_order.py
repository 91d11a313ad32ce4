"""The order of a file's block scales: proven, voted for, said; never guessed without a word."""

import re

import pytest
import torch

from lowbit.quant import dialects, formats
from lowbit.quant.checkpoint import Checkpoint
from lowbit.quant.checkpoint.foreign import AmbiguousError, Request
from lowbit.quant.checkpoint.stored import marker_tensor, stored_layers
from lowbit.quant.convert_file import convert_file
from lowbit.quant.inspect_file import inspect_file
from lowbit.quant.scale_order import EITHER, FLAT, SWIZZLED, TWICE, proven_order, wrong_order
from tests import foreign
from tests.quant.dialects.conftest import marked, repacked, same_bits
from tests.quant.dialects.test_dialects import BLOCKS, OF_MODELOPT


def of_either_order(name):
    """(a weight, its layer with scales swizzled twice).

    With 16 columns of scales, flat and twice show rows and columns alike, the host's order fewer.
    """
    weight = foreign.patterned(256, 16 * foreign.GROUPS[name])
    return weight, foreign.twice(foreign.packed(name, weight))


@pytest.mark.parametrize("name", BLOCKS)
def test_scales_proven_wrong_in_an_order_that_is_not_are_refused_with_both(opened, name):
    """Else they are read as they are marked, and give noise."""
    weight, bad = of_either_order(name)
    for layer, sources in (
        (marked(name, bad), f"`--from {name}` or `--from modelopt`"),
        (bad, f"`--from modelopt` or `--from {name}`"),
    ):
        checkpoint = opened({"m": layer})
        with pytest.raises(AmbiguousError, match="not swizzled, or swizzled twice") as error:
            stored_layers(checkpoint)
        assert f"{sources}, and `--scales flat` or `--scales twice`" in str(error.value)
        (found,) = stored_layers(checkpoint, Request(name, "twice")).values()
        same_bits(repacked(found, checkpoint), foreign.packed(name, weight))


@pytest.mark.parametrize("name", BLOCKS)
def test_dialect_asked_for_decides_between_two_orders_where_it_knows_one(opened, name):
    _, bad = of_either_order(name)
    checkpoint = opened({"m": bad})
    (found,) = stored_layers(checkpoint, Request("modelopt")).values()
    assert found.marked_by == "modelopt"
    with pytest.raises(AmbiguousError, match=f"`--from {name}`, and `--scales flat` or"):
        stored_layers(checkpoint, Request(name))
    (found,) = stored_layers(opened({"m": bad}, OF_MODELOPT)).values()
    assert found.marked_by == "modelopt"


STRUCTURES = ["diagonal", "blocks", "tiles"]


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("name", BLOCKS)
def test_structure_of_one_weight_contradicts_no_file(opened, caplog, name, kind):
    """A good file: its other layers show the right order, or nothing."""
    weight = foreign.with_structure(kind)
    odd = foreign.packed(name, weight)
    rows, columns = weight.shape[0], weight.shape[1] // foreign.GROUPS[name]
    wrong = wrong_order(odd["weight_scale"], rows, columns)
    assert wrong, "shows nothing"
    others = {"a": foreign.patterned(), "c": foreign.even()}
    for other in others.values():
        layers = {"b": odd, "a": foreign.packed(name, other)}
        caplog.clear()
        checkpoint = opened({n: marked(name, parts) for n, parts in layers.items()})
        found = stored_layers(checkpoint)
        assert all(layer.reading is None for layer in found.values())
        (record,) = caplog.records
        command = rf"scales of b look as if .* `lowbit convert '{checkpoint.path}' DST` with `--sc"
        assert re.search(command, record.getMessage())
        assert not inspect_file(checkpoint.path).errors
    unmarked = opened({"b": odd, "a": foreign.packed(name, others["a"])})
    if wrong == EITHER:
        same_bits(repacked(stored_layers(unmarked)["b"], unmarked), odd)
    else:
        with pytest.raises(AmbiguousError, match="--scales swizzled"):
            stored_layers(unmarked)


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("name", BLOCKS)
def test_file_of_nothing_but_structure_is_refused_with_the_command_that_says_it_is_right(
    opened, tmp_path, name, kind
):
    odd = foreign.packed(name, foreign.with_structure(kind))
    checkpoint = opened({"blocks.0.ffn.0": marked(name, odd)})
    right = "`--scales swizzled` if the marking is right"
    with pytest.raises(AmbiguousError, match=right):
        stored_layers(checkpoint)
    convert_file(checkpoint.path, target := tmp_path / "right.safetensors", order="swizzled")
    (found,) = stored_layers(written := Checkpoint(target)).values()
    same_bits(repacked(found, written), odd)
    assert inspect_file(checkpoint.path).errors and not inspect_file(written.path).errors


@pytest.mark.parametrize("name", BLOCKS)
def test_most_layers_decide_on_the_order_of_a_marked_file(opened, caplog, name):
    good = foreign.packed(name, foreign.patterned())
    bad = {**foreign.twice(good)}
    for layers, is_bad in (("gb", False), ("gbb", True), ("ggb", False)):
        parts = {str(i): marked(name, bad if one == "b" else good) for i, one in enumerate(layers)}
        checkpoint = opened(parts)
        if is_bad:
            with pytest.raises(AmbiguousError, match=f"--from {name} --scales twice"):
                stored_layers(checkpoint)
        else:
            assert all(found.reading is None for found in stored_layers(checkpoint).values())
        assert ("DST` with `--scales twice`" in caplog.text) != is_bad
        caplog.clear()


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_that_show_nothing_speak_for_no_marking(opened, caplog, name):
    """Two that speak against it are refused, however many are silent; one of them is not."""
    silent = marked(name, foreign.packed(name, foreign.even()))
    bad = marked(name, foreign.twice(foreign.packed(name, foreign.patterned())))
    layers = {str(i): silent for i in range(6)}
    checkpoint = opened(layers | {"a": bad})
    assert all(found.reading is None for found in stored_layers(checkpoint).values())
    assert "scales of a look as if" in caplog.text
    checkpoint = opened(layers | {"a": bad, "b": bad})
    with pytest.raises(AmbiguousError, match=f"--from {name} --scales twice.*--scales swizzled"):
        stored_layers(checkpoint)
    assert any(p.code == "scale_order" for p in inspect_file(checkpoint.path).errors)


@pytest.mark.parametrize(("name", "other"), [BLOCKS, BLOCKS[::-1]])
def test_layers_of_another_format_speak_for_no_marking(opened, caplog, name, other):
    """And what is then asked for holds for the format that it names."""
    good, right = (foreign.packed(x, foreign.patterned()) for x in (name, other))
    layers = {str(i): marked(name, foreign.twice(good)) for i in range(3)}
    checkpoint = opened(layers | {f"other{i}": marked(other, right) for i in range(8)})
    with pytest.raises(AmbiguousError, match=f"--from {name} --scales twice"):
        stored_layers(checkpoint)
    errors = [p for p in inspect_file(checkpoint.path).errors if p.code == "scale_order"]
    assert errors and not any("other" in layer for p in errors for layer in p.layers)
    caplog.clear()
    found = stored_layers(checkpoint, Request(name, "twice"))
    same_bits(repacked(found["0"], checkpoint), good)
    same_bits(repacked(found["other0"], checkpoint), right)
    assert not caplog.records


@pytest.mark.parametrize("name", BLOCKS)
def test_order_that_is_asked_for_stands_and_is_doubted_where_layers_show_another(
    opened, caplog, name
):
    good = foreign.packed(name, foreign.patterned())
    checkpoint = opened({str(i): marked(name, good) for i in range(3)})
    found = stored_layers(checkpoint, Request("modelopt", "flat"))
    assert {layer.marked_by for layer in found.values()} == {"modelopt"}
    words = r"scales of 0 and of 2 more layers look as if swizzled, .* read as not swizzled"
    assert re.search(words, caplog.text)


@pytest.mark.parametrize("order", ["flat", "twice"])
def test_order_of_a_marked_mxfp8_in_plain_bytes_is_looked_at(opened, order):
    weight = foreign.patterned()
    good = foreign.packed("mxfp8", weight)
    bad = foreign.twice(good)
    if order == "flat":
        bad = {**good, "weight_scale": foreign.flat_scales("mxfp8", weight, good)}
    plain = {part: tensor.view(torch.uint8) for part, tensor in bad.items()}
    checkpoint = opened({str(i): marked("mxfp8", plain) for i in range(3)})
    with pytest.raises(AmbiguousError, match=f"--from mxfp8 --scales {order}"):
        stored_layers(checkpoint)
    assert any(p.code == "scale_order" for p in inspect_file(checkpoint.path).errors)
    found = stored_layers(checkpoint, Request("mxfp8", order))
    same_bits(repacked(found["0"], checkpoint), good)


@pytest.mark.parametrize(("name", "other"), [BLOCKS, BLOCKS[::-1]])
def test_only_layer_of_its_format_is_refused_where_it_shows_another_order(
    opened, tmp_path, name, other
):
    """Layers of other formats do not show that it is a weight with structure."""
    good = foreign.packed(name, foreign.patterned())
    others = {str(i): marked(other, foreign.packed(other, foreign.patterned())) for i in range(4)}
    checkpoint = opened(others | {"a": marked(name, foreign.twice(good))})
    with pytest.raises(AmbiguousError, match=rf"a: .*--from {name} --scales twice.*--scales swiz"):
        stored_layers(checkpoint)
    assert any(p.code == "scale_order" for p in inspect_file(checkpoint.path).errors)
    found = stored_layers(checkpoint, Request(name, "twice"))
    same_bits(repacked(found["a"], checkpoint), good)
    odd = foreign.packed(name, foreign.with_structure("tiles"))
    checkpoint = opened(others | {"a": marked(name, odd)})
    with pytest.raises(AmbiguousError, match="`--scales swizzled` if the marking is right"):
        stored_layers(checkpoint)
    convert_file(checkpoint.path, target := tmp_path / "right.safetensors", order="swizzled")
    same_bits(repacked(stored_layers(written := Checkpoint(target))["a"], written), odd)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("pairs", [2, 4])
def test_marked_file_with_half_of_its_layers_in_another_order_is_refused(opened, name, pairs):
    good = marked(name, foreign.packed(name, foreign.patterned()))
    bad = marked(name, foreign.twice(good))
    layers = {f"{i}{n}": parts for i in range(pairs) for n, parts in (("a", good), ("b", bad))}
    checkpoint = opened(layers)
    with pytest.raises(AmbiguousError, match="with `--scales swizzled` or `--scales twice`"):
        stored_layers(checkpoint)
    assert any(p.code == "scale_order" for p in inspect_file(checkpoint.path).errors)
    assert stored_layers(checkpoint, Request(order="swizzled"))


def test_metadata_of_modelopt_stand_until_two_layers_speak_against_them(opened, caplog):
    silent = foreign.packed("nvfp4", foreign.even())
    swizzled = foreign.packed("nvfp4", foreign.patterned())
    layers = {str(i): silent for i in range(3)} | {"a": swizzled}
    (dialect,) = {x.marked_by for x in stored_layers(opened(layers, OF_MODELOPT)).values()}
    assert dialect == "modelopt" and "scales of a look as if swizzled" in caplog.text
    caplog.clear()
    checkpoint = opened(layers | {"b": swizzled}, OF_MODELOPT)
    found = stored_layers(checkpoint)
    assert {layer.marked_by for layer in found.values()} == {"nvfp4"} and not caplog.records
    same_bits(repacked(found["a"], checkpoint), swizzled)


def test_unmarked_format_that_shows_nothing_lies_as_the_rest_of_its_file(opened):
    layers = {
        "a": foreign.modelopt(foreign.patterned(), "nvfp4"),
        "b": foreign.modelopt(foreign.even(), "mxfp8"),
    }
    found = stored_layers(opened(layers))
    assert {layer.marked_by for layer in found.values()} == {"modelopt"}


@pytest.mark.parametrize("name", BLOCKS)
def test_file_that_is_refused_is_not_said_to_be_read(opened, caplog, name):
    weight, bad = of_either_order(name)
    layers = {str(i): bad for i in range(3)} | {"right": foreign.packed(name, weight)}
    with pytest.raises(AmbiguousError, match="not swizzled, or swizzled twice"):
        stored_layers(opened(layers))
    assert not caplog.records


@pytest.mark.parametrize("name", BLOCKS)
def test_unmarked_layers_of_two_orders_are_refused_with_both_commands(opened, name):
    weight = foreign.patterned()
    layers = {"a": foreign.packed(name, weight), "b": foreign.modelopt(weight, name)}
    with pytest.raises(AmbiguousError, match="in different orders: of ") as error:
        stored_layers(opened(layers))
    assert "with `--scales flat` or `--scales swizzled`" in str(error.value)


@pytest.mark.parametrize("name", BLOCKS)
def test_marked_layers_whose_paddings_contradict_are_refused_unless_the_file_is_ours(opened, name):
    good = foreign.packed(name, foreign.even(160, 1024))
    layers = {"a": marked(name, good), "b": marked(name, foreign.twice(good))}
    checkpoint = opened(layers)
    with pytest.raises(AmbiguousError, match="with `--scales swizzled` or `--scales twice`"):
        stored_layers(checkpoint)
    assert any(p.code == "scale_order" for p in inspect_file(checkpoint.path).errors)
    assert not inspect_file(opened(layers, {"_lowbit": "{}"}).path).errors


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_counts_more_than_any_pattern(opened, name):
    bad = foreign.twice(foreign.packed(name, foreign.patterned()))
    layers = {str(i): marked(name, bad) for i in range(3)}
    layers["sized"] = marked(name, foreign.packed(name, foreign.even(160, 1024)))
    found = stored_layers(opened(layers))
    assert all(layer.reading is None for layer in found.values())


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_that_is_not_zero_proves_nothing(opened, name):
    """Of layers of swizzled size nothing else is left, unless a pattern says so."""
    sized = foreign.packed(name, foreign.even(160, 1024))
    codes = sized["weight_scale"].view(torch.uint8)
    sized["weight_scale"] = torch.where(codes == 0, 1, codes).view(sized["weight_scale"].dtype)
    bad = foreign.twice(foreign.packed(name, foreign.patterned()))
    layers = {"sized": marked(name, sized)} | {str(i): marked(name, bad) for i in range(3)}
    with pytest.raises(AmbiguousError, match="--scales twice"):
        stored_layers(opened(layers))


def test_layers_that_are_looked_at_are_of_every_kind(opened):
    """Ten kinds in each of sixteen blocks: eight evenly spaced ones would all be of one kind."""
    parts = foreign.packed("nvfp4", foreign.even(128, 64))
    checkpoint = opened({f"{i:03}": {p: t.clone() for p, t in parts.items()} for i in range(160)})
    infos = {part: checkpoint[f"000.{part}"] for part in parts}
    seen = []

    def read(layer, part):
        seen.append(int(layer))
        return checkpoint.read(f"{layer}.{part}")

    dialects.find_orders((dialects.RawLayer(f"{i:03}", infos) for i in range(160)), read)
    assert len(seen) == 8 and len({i % 10 for i in seen}) == 8


@pytest.mark.parametrize("name", BLOCKS)
def test_other_layers_of_a_file_in_one_of_two_orders_are_read(opened, name):
    _, bad = of_either_order(name)
    rows = foreign.packed("fp8_e4m3_rowwise", foreign.even(64, 256))
    rows["weight_scale"] = rows["weight_scale"].reshape(-1)
    checkpoint = opened({"m": bad, "rows": rows})
    found = stored_layers(checkpoint, Request(order="flat"))
    assert found["m"].marked_by == "modelopt" and found["rows"].format.name == "fp8_e4m3_rowwise"


def test_marked_layer_in_a_wrong_order_is_refused_though_another_format_is_asked_for(opened):
    bad = foreign.twice(foreign.packed("nvfp4", foreign.patterned()))
    bad["comfy_quant"] = marker_tensor(formats.get("nvfp4").marker)
    checkpoint = opened({"m": bad, "n": foreign.packed("int8", foreign.even(64, 256))})
    with pytest.raises(AmbiguousError, match="--from nvfp4 --scales twice"):
        stored_layers(checkpoint, Request("int8"))


@pytest.mark.parametrize("name", BLOCKS)
def test_heuristic_never_proves_a_wrong_order(name):
    """Of five weights with a pattern it proves nearly all, of those without one none."""
    proven = 0
    for seed in range(5):
        weight = foreign.patterned(512, 2048, seed)
        parts = foreign.packed(name, weight)
        flat = foreign.flat_scales(name, weight, parts)
        again = foreign.twice(parts)["weight_scale"]
        made = {FLAT: flat, SWIZZLED: parts["weight_scale"], TWICE: again}
        for order, scale in made.items():
            found, deviations = proven_order(scale.view(flat.dtype), *flat.shape)
            assert found in (order, None), (seed, order, deviations)
            proven += found == order
        plain = foreign.packed(name, foreign.even(512, 2048, seed))["weight_scale"]
        assert proven_order(plain.view(flat.dtype), *flat.shape)[0] is None
    assert proven >= 0.9 * 3 * 5
