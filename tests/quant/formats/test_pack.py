"""What a format is on disk, and what its record says."""

import dataclasses

import pytest
import torch
from comfy_kitchen.float_utils import from_blocked
from comfy_kitchen.tensor import get_layout_class
from safetensors.torch import load_file, save_file

from lowbit.ops.linear import linear, w4a8, w4a16
from lowbit.quant import formats
from lowbit.quant.scale_order import wrong_order

SHAPES = [(160, 512), (33, 256), (37, 100), (1, 256)]


@pytest.fixture(params=SHAPES, ids=str)
def weight(request, fmt, quantized):
    if fmt.unfit(request.param):
        pytest.skip(fmt.unfit(request.param))
    return quantized(fmt, request.param)


def unpack(fmt, tensors, shape=None):
    return fmt.unpack(tensors, torch.float32, shape, fmt.marker)


def test_pack_unpack_pack_gives_the_same_bytes(fmt, weight, same_bits):
    packed = fmt.pack(weight)
    back = unpack(fmt, packed, tuple(weight.shape))
    again = fmt.pack(back)
    assert packed.keys() == again.keys()
    assert all(same_bits(packed[name], again[name]) for name in packed)
    assert same_bits(back.dequantize(), weight.dequantize())
    assert back._layout_cls == weight._layout_cls


def test_packed_tensors_survive_safetensors(fmt, weight, same_bits, tmp_path):
    packed = {name: t.contiguous() for name, t in fmt.pack(weight).items()}
    save_file(packed, tmp_path / "layer.safetensors")
    loaded = load_file(tmp_path / "layer.safetensors")
    assert all(same_bits(loaded[name], packed[name]) for name in packed)
    back = unpack(fmt, loaded, tuple(weight.shape))
    assert same_bits(back.dequantize(), weight.dequantize())


def test_bytes_of_unnamed_type_are_read(fmt, weight, same_bits):
    """Writers without a dtype for FP8 or E8M0, or a signed byte, call it uint8."""
    packed = fmt.pack(weight)
    plain = {n: t.view(torch.uint8) if t.itemsize == 1 else t for n, t in packed.items()}
    back = unpack(fmt, plain, tuple(weight.shape))
    assert same_bits(back.dequantize(), weight.dequantize())


def test_without_shape_the_padded_one_is_taken(fmt, weight):
    back = unpack(fmt, fmt.pack(weight))
    n, k = weight.shape
    assert back.shape == (-(-n // fmt.pad_multiple) * fmt.pad_multiple, back.shape[1])
    assert back.dequantize()[:n, :k].equal(weight.dequantize())
    assert not back.dequantize()[n:].any()
    assert not back.dequantize()[:, k:].any()


@pytest.fixture
def packed(fmt, quantized):
    return fmt.pack(quantized(fmt, (160, 512)))


def test_each_missing_tensor_is_named(fmt, packed):
    for name in packed:
        rest = {n: t for n, t in packed.items() if n != name}
        if name in fmt.optional:
            unpack(fmt, rest)
            continue
        with pytest.raises(ValueError, match=rf"{fmt.name}: {name} missing"):
            unpack(fmt, rest)


def test_each_misshapen_scale_is_named(fmt, packed):
    for param, name in fmt.scales.items():
        if name not in packed:
            continue
        wrong = torch.ones(3, 5).to(packed[name].dtype)
        with pytest.raises(ValueError, match=rf"{name}|{param}") as caught:
            unpack(fmt, packed | {name: wrong})
        assert "shape" in str(caught.value) or "elements" in str(caught.value)


def test_scale_of_another_size_is_refused(fmt, packed):
    """Truncated, padded once too often, or of a wider weight: each by the name of the tensor."""
    for name in (n for n in fmt.scales.values() if n in packed and packed[n].numel() > 1):
        for wrong in (packed[name][:-1], torch.cat([packed[name]] * 2)):
            # comfy-kitchen's own checks have the parameter's name.
            with pytest.raises(ValueError, match=rf"{name}|{name.removeprefix('weight_')} must"):
                unpack(fmt, packed | {name: wrong})


BLOCKS = [name for name in formats.names() if formats.get(name).pad_multiple > 1]


@pytest.mark.parametrize("plain", [False, True], ids=["named bytes", "plain bytes"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("other", BLOCKS)
def test_nvfp4s_and_mx_scales_do_not_mix(name, other, plain, quantized):
    """Told by their dtype, by the scale of the tensor, or by their number; never read as ours."""
    fmt, foreign = formats.get(name), formats.get(other)
    if fmt.group == foreign.group:
        pytest.skip("the same kind of scales")
    packed = foreign.pack(quantized(foreign, (160, 512)))
    weight = fmt.pack(quantized(fmt, (160, 512)))["weight"]
    scales = {n: t for n, t in packed.items() if n != "weight"}
    if plain:
        scales["weight_scale"] = scales["weight_scale"].view(torch.uint8)
    words = "power of two" if foreign.group == 32 else "weight_scale_2"
    with pytest.raises(ValueError, match=rf"{name}: weight_scale.*{words}.*do not mix"):
        unpack(fmt, {"weight": weight, **scales})
    if fmt.group == 32:
        with pytest.raises(ValueError, match=rf"{name}: weight_scale .*do not mix"):
            unpack(fmt, {"weight": weight, "weight_scale": scales["weight_scale"]})


@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("name", BLOCKS)
def test_number_of_scales_that_is_of_both_kinds_is_of_the_marked_one(name, columns, quantized):
    """Narrow weights have as many with one scale per 16 as per 32, padding included."""
    fmt = formats.get(name)
    weight = quantized(fmt, (160, columns))
    plain = {n: t.view(torch.uint8) if t.itemsize == 1 else t for n, t in fmt.pack(weight).items()}
    assert torch.equal(unpack(fmt, plain, (160, columns)).dequantize(), weight.dequantize())


@pytest.mark.parametrize("name", BLOCKS)
def test_what_lies_in_the_padding_of_scales_changes_no_value(name, gaussian):
    """Files of other programs may hold anything there; here NaN, in rows and in columns."""
    fmt, shape = formats.get(name), (37, 200)
    tensors = fmt.pack(fmt.quantize(gaussian(*shape)))
    weight = unpack(fmt, tensors, shape)
    scale = tensors["weight_scale"].view(torch.uint8).clone()
    places = torch.arange(scale.numel()).reshape(scale.shape)
    real = from_blocked(places, num_rows=37, num_cols=-(-200 // fmt.group)).reshape(-1)
    poisoned = torch.full_like(scale, 0x7F if fmt.group == 16 else 0xFF)
    poisoned.reshape(-1)[real] = scale.reshape(-1)[real]
    assert 0 < real.numel() < scale.numel()
    tensors["weight_scale"] = poisoned.view(tensors["weight_scale"].dtype)
    bad, x = unpack(fmt, tensors, shape), gaussian(3, 200)
    assert torch.equal(bad.dequantize(), weight.dequantize())
    assert torch.equal(linear(x, bad), linear(x, weight))
    if fmt.packed == 2:
        for run in (w4a16.run, w4a8.run):
            assert torch.equal(run(x, bad, None, "reference"), run(x, weight, None, "reference"))
    # Nor is its order put into question.
    assert wrong_order(tensors["weight_scale"], 37, real.numel() // 37) is None


def test_payload_of_another_type_is_refused(fmt, packed):
    others = {torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2}
    for dtype in others - {fmt.storage}:
        wrong = torch.zeros(packed["weight"].shape, dtype=dtype)
        with pytest.raises(ValueError, match=f"{fmt.name}: weight is {dtype}"):
            unpack(fmt, packed | {"weight": wrong})


def test_signed_payload_under_a_float_format_is_refused(fmt, packed):
    """They are INT8's numbers; read as codes, every 128th is NaN."""
    wrong = packed | {"weight": packed["weight"].view(torch.int8)}
    if not fmt.storage.is_floating_point:
        unpack(fmt, wrong)
        return
    with pytest.raises(ValueError, match=f"{fmt.name}: weight is torch.int8, {fmt.storage}"):
        unpack(fmt, wrong)


def test_payload_that_is_no_matrix_is_refused(fmt, packed):
    with pytest.raises(ValueError, match="weight is 1-D"):
        unpack(fmt, packed | {"weight": packed["weight"].reshape(-1)})


@pytest.mark.parametrize("shape", [(161, 512), (160, 513), (160,), (160, 512, 1)])
def test_logical_shape_beyond_what_is_stored_is_refused(fmt, packed, shape):
    with pytest.raises(ValueError, match="weight holds"):
        unpack(fmt, packed, shape)


def test_bf16_scales_are_read_as_float32(fmt, packed):
    rough = {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in packed.items()}
    back = fmt.pack(unpack(fmt, rough))
    assert all(back[n].dtype == packed[n].dtype for n in packed)
    assert all(back[n].equal(rough[n].float()) for n in packed if packed[n].dtype == torch.float32)


def test_marker_names_its_format(fmt):
    assert formats.from_marker(fmt.marker) is fmt
    extra = {**fmt.marker, "full_precision_matrix_mult": True, "written_by": "another"}
    assert formats.from_marker(extra) is fmt


def test_options_nested_under_params_are_read(fmt, packed):
    """The layout of markers of older writers."""
    nested = {"format": fmt.marker["format"], "params": dict(fmt.marker)}
    assert formats.from_marker(nested) is fmt
    want = fmt.unpack(packed, torch.float32, None, fmt.marker)._params
    got = fmt.unpack(packed, torch.float32, None, nested)._params
    for field in dataclasses.fields(want):
        if not isinstance(getattr(want, field.name), torch.Tensor):
            assert getattr(got, field.name) == getattr(want, field.name)


def test_width_of_the_rotation_is_read_from_the_marker(quantized):
    fmt = formats.get("int8_convrot")
    marker = {**fmt.marker, "convrot_groupsize": 64}
    back = fmt.unpack(fmt.pack(quantized(fmt, (160, 512))), torch.float32, None, marker)
    assert back._params.convrot_groupsize == 64


@pytest.mark.parametrize("marker", [{}, {"format": "int3"}, {"format": None}])
def test_unknown_marker_is_refused(marker):
    with pytest.raises(ValueError, match="unknown format"):
        formats.from_marker(marker)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'int3'.*" + ", ".join(formats.names())):
        formats.get("int3")


def test_quantized_weight_knows_its_format(fmt, quantized):
    weight = quantized(fmt, (160, 512))
    assert formats.of(weight) is fmt
    with pytest.raises(ValueError, match="not one of this pack's"):
        formats.of(type(weight)(weight._qdata, fmt.layout.kitchen_layout, weight._params))


def test_names_and_markers_are_unique():
    records = [formats.get(name) for name in formats.names()]
    on_disk = {(f.marker["format"], bool(f.marker.get("convrot"))) for f in records}
    assert len({f.name for f in records}) == len(on_disk) == len(records)
    assert len({f.layout for f in records}) == len(records)
    assert [f.bits >= 8 for f in records] == sorted([f.bits >= 8 for f in records], reverse=True)


def test_record_agrees_with_what_is_stored(fmt, quantized):
    n, k = 128, 2048
    packed = fmt.pack(quantized(fmt, (n, k)))
    stored_bits = 8 * sum(t.nbytes for t in packed.values()) / (n * k)
    # The rest is one float32 scale per row of 2048 and a codebook of 64 bytes.
    assert fmt.bits <= stored_bits <= fmt.bits + 32 / k + 8 * 64 / (n * k)
    assert packed["weight"].dtype == fmt.storage
    assert packed["weight"].shape == (n, k // fmt.packed)
    assert set(packed) - {"weight"} <= set(fmt.scales.values())
    assert fmt.optional <= set(fmt.scales.values())


def test_record_agrees_with_its_layout(fmt):
    assert get_layout_class(fmt.layout.__name__) is fmt.layout
    assert issubclass(fmt.layout, get_layout_class(fmt.layout.kitchen_layout))
    assert {field.name for field in dataclasses.fields(fmt.layout.Params)} >= set(fmt.scales)
    assert fmt.native == (fmt.stand_in is None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bits = 1


def test_codes_reach_the_largest_magnitude(fmt, quantized):
    """`max` is what the largest stored code stands for, before the scale."""
    codes = quantized(fmt, (160, 512))._qdata
    if fmt.storage.is_floating_point:
        assert fmt.max == torch.finfo(fmt.storage).max
        # The power of two below a block's largest value may leave the topmost codes unused.
        assert codes.float().abs().max() == fmt.max or fmt.group
    elif fmt.packed == 1:
        assert codes.abs().max() == fmt.max
