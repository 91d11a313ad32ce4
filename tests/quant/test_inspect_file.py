import json

import pytest
import torch
from comfy_kitchen.float_utils import from_blocked, swap_nibbles, to_blocked
from safetensors.torch import save_file

from lowbit.quant import formats
from lowbit.quant.checkpoint.stored import marker_tensor
from lowbit.quant.inspect_file import inspect_file
from lowbit.quant.inspect_problems import BOTH, HOST, KINDS, NOBODY, PACK
from tests import foreign

LAYER = "blocks.0.ffn.0"
MODELOPT = {"quantization_config": '{"quant_method": "modelopt", "quant_algo": "NVFP4"}'}


def weight(rows=256, columns=512, seed=0):
    """A weight with rows and columns of different size, as trained ones have."""
    noise = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=noise)
    sizes = torch.randn(rows, 1, generator=noise) + torch.randn(1, columns, generator=noise)
    return values * (0.3 * sizes).exp()


def layer(format_name, values=None, **marker):
    """The tensors of one layer in a format."""
    fmt = formats.get(format_name)
    parts = fmt.pack(fmt.quantize(weight() if values is None else values))
    parts["comfy_quant"] = marker_tensor({**fmt.marker, **marker})
    return {f"{LAYER}.{part}": tensor for part, tensor in parts.items()}


def changed(tensors, part, new):
    """The tensors with one part of the layer replaced, or with None left out."""
    tensors = {n: t for n, t in tensors.items() if n != f"{LAYER}.{part}"}
    return tensors if new is None else {**tensors, f"{LAYER}.{part}": new}


def unmarked(tensors):
    return changed(tensors, "comfy_quant", None)


def legacy(format_name):
    tensors = unmarked(layer(format_name))
    value = tensors.pop(f"{LAYER}.weight_scale")
    tensors[f"{LAYER}.scale_weight"] = value
    return {**tensors, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}


def scale_of(tensors):
    return tensors[f"{LAYER}.weight_scale"]


def swizzled_again(tensors):
    scale = scale_of(tensors)
    twice = to_blocked(scale.view(torch.uint8), flatten=False).view(scale.dtype)
    return changed(tensors, "weight_scale", twice)


def flat(tensors):
    scale = scale_of(tensors)
    codes = from_blocked(scale.view(torch.uint8), *scale.shape).contiguous()
    return changed(tensors, "weight_scale", codes.view(scale.dtype))


def with_nan(tensors, part="weight_scale"):
    bad = tensors[f"{LAYER}.{part}"].clone()
    codes = bad.reshape(-1).view(torch.uint8)
    codes[: bad.element_size()] = 0xFF
    return changed(tensors, part, bad)


def as_bytes(format_name, dtype):
    tensors = layer(format_name)
    return changed(tensors, "weight", tensors[f"{LAYER}.weight"].view(dtype))


def renamed_format(name):
    return changed(layer("fp8_e4m3"), "comfy_quant", marker_tensor({"format": name}))


def metadata(layers):
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


FP8_LAYER = {LAYER: {"format": "float8_e4m3fn"}}
ROWS = torch.full((256,), 0.01)
FUSED = {
    "head.modulation": torch.zeros(1, 2, 8),
    "blocks.0.self_attn.to_qkv.weight": torch.zeros(24, 8),
}
DIFFUSERS = {
    "scale_shift_table": torch.zeros(1, 2, 8),
    "blocks.0.ffn.net.0.proj.weight": torch.zeros(24, 8),
}


def wan_without(*names):
    """The tensors of a two-block Wan but for some."""
    tensors = {"head.modulation": torch.zeros(1, 2, 64), "head.head.weight": torch.zeros(64, 64)}
    tensors["patch_embedding.weight"] = torch.zeros(64, 16, 1, 2, 2)
    for i in range(2):
        for name, shape in {
            "ffn.0": (128, 64),
            "ffn.2": (64, 128),
            "self_attn.q": (64, 64),
        }.items():
            tensors[f"blocks.{i}.{name}.weight"] = torch.zeros(shape)
    return {n: t for n, t in tensors.items() if n not in names}


def flux_in_diffusers_names():
    names = ("x_embedder", "single_transformer_blocks.0.attn.norm_k")
    return {**layer("int8"), **{f"{n}.weight": torch.zeros(8, 8) for n in names}}


def among_others():
    """A good file: one of its weights has a diagonal."""
    odd = layer("nvfp4", foreign.with_structure("diagonal"))
    return {**layer("nvfp4"), **{n.replace("ffn.0", "ffn.2"): t for n, t in odd.items()}}


# What is wrong → (file: tensors, or tensors and metadata; code; affects). Made when the test runs.
BAD = {
    "a block lacks a weight": (
        lambda: wan_without("blocks.1.ffn.0.weight"),
        "incomplete",
        BOTH,
    ),
    "a prefix that ComfyUI does not know": (
        lambda: {f"diffusion_model.{n}": t for n, t in wan_without().items()},
        "unknown_prefix",
        (HOST,),
    ),
    "quantized layers in a file that ComfyUI converts": (
        flux_in_diffusers_names,
        "fused_layers",
        BOTH,
    ),
    "raw FP8": (lambda: {f"{LAYER}.weight": weight().to(torch.float8_e4m3fn)}, "fp8_unscaled", ()),
    "weight_scale alone": (lambda: unmarked(layer("fp8_e4m3")), "scale_ignored", (HOST,)),
    "scale_weight without flag": (
        lambda: {n: t for n, t in legacy("fp8_e4m3").items() if n != "scaled_fp8"},
        "scale_ignored",
        (HOST,),
    ),
    "weight_scale with the flag for scale_weight": (
        lambda: {**unmarked(layer("fp8_e4m3")), "scaled_fp8": torch.zeros(0)},
        "scale_ignored",
        (HOST,),
    ),
    "flag beside metadata": (
        lambda: (legacy("fp8_e4m3"), metadata({})),
        "scale_ignored",
        (HOST,),
    ),
    "scale under a name that nobody reads": (
        lambda: {
            f"{LAYER}.weight": weight().to(torch.float8_e4m3fn),
            f"{LAYER}.weight_scale_inv": torch.ones(2, 4),
        },
        "scale_ignored",
        BOTH,
    ),
    "FP8 scale left out": (
        lambda: changed(layer("fp8_e4m3"), "weight_scale", None),
        "scale_missing",
        BOTH,
    ),
    "NVFP4 tensor scale left out": (
        lambda: changed(layer("nvfp4"), "weight_scale_2", None),
        "scale_missing",
        BOTH,
    ),
    "per-channel FP8 marked per tensor": (
        lambda: changed(layer("fp8_e4m3"), "weight_scale", ROWS[:, None]),
        "per_channel_as_tensor",
        (HOST,),
    ),
    "1-D per-channel FP8 marked per tensor": (
        lambda: changed(layer("fp8_e4m3"), "weight_scale", ROWS),
        "per_channel_as_tensor",
        (HOST,),
    ),
    "per-channel FP8 under scaled_fp8": (
        lambda: legacy("fp8_e4m3_rowwise"),
        "per_channel_as_tensor",
        (HOST,),
    ),
    "blockwise FP8 marked per tensor": (
        lambda: changed(layer("fp8_e4m3"), "weight_scale", torch.ones(2, 4)),
        "scale_shape",
        (HOST,),
    ),
    "INT8 scale [N]": (
        lambda: changed(layer("int8"), "weight_scale", ROWS),
        "scale_shape",
        (HOST,),
    ),
    "NVFP4 scales of other rows": (
        lambda: changed(layer("nvfp4"), "weight_scale", scale_of(layer("nvfp4"))[:128]),
        "scale_shape",
        BOTH,
    ),
    "flat NVFP4 scales that need padding": (
        lambda: changed(
            layer("nvfp4", weight(192, 512)),
            "weight_scale",
            torch.ones(192, 32).to(torch.float8_e4m3fn),
        ),
        "scale_shape",
        BOTH,
    ),
    "MXFP4 tensors marked NVFP4": (
        lambda: changed(layer("mxfp4"), "comfy_quant", marker_tensor({"format": "nvfp4"})),
        "scale_kind",
        BOTH,
    ),
    "NVFP4 tensors marked MXFP4": (
        lambda: changed(layer("nvfp4"), "comfy_quant", marker_tensor({"format": "mxfp4"})),
        "scale_kind",
        BOTH,
    ),
    "NaN in an FP8 scale": (lambda: with_nan(layer("fp8_e4m3")), "scale_not_finite", BOTH),
    "Inf in an INT8 scale": (
        lambda: changed(layer("int8"), "weight_scale", torch.full((256, 1), torch.inf)),
        "scale_not_finite",
        BOTH,
    ),
    "NaN in an NVFP4 block scale": (lambda: with_nan(layer("nvfp4")), "scale_not_finite", BOTH),
    "NaN in an MXFP8 block scale": (lambda: with_nan(layer("mxfp8")), "scale_not_finite", BOTH),
    "NaN in a codebook": (
        lambda: changed(layer("asym_w4a8_int8"), "weight_codebook", torch.full((16,), torch.nan)),
        "scale_not_finite",
        BOTH,
    ),
    "NaN in an input scale": (
        lambda: changed(layer("fp8_e4m3"), "input_scale", torch.tensor(torch.nan)),
        "scale_not_finite",
        BOTH,
    ),
    "NaN in ModelOpt's NVFP4": (
        lambda: (unmarked(with_nan(layer("nvfp4"), "weight_scale_2")), MODELOPT),
        "scale_not_finite",
        BOTH,
    ),
    "Inf in a scale of LightX2V's": (
        lambda: {
            f"{LAYER}.{p}": torch.tensor(torch.inf) if p == "alpha" else t
            for p, t in foreign.lightx2v(weight()).items()
        },
        "scale_not_finite",
        BOTH,
    ),
    "flat NVFP4 scales": (lambda: flat(layer("nvfp4", weight(1024, 1024))), "scale_order", BOTH),
    "NVFP4 scales swizzled twice": (
        lambda: swizzled_again(layer("nvfp4", weight(1024, 1024))),
        "scale_order",
        BOTH,
    ),
    "flat MXFP8 scales": (lambda: flat(layer("mxfp8", weight(1024, 1024))), "scale_order", BOTH),
    "padded MXFP8 scales swizzled twice": (
        lambda: swizzled_again(layer("mxfp8", weight(160, 512))),
        "scale_order",
        BOTH,
    ),
    "NVFP4 of a weight with a diagonal, among others": (
        among_others,
        "scale_order_doubtful",
        NOBODY,
    ),
    "bfloat16 marked FP8": (
        lambda: changed(layer("fp8_e4m3"), "weight", weight().bfloat16()),
        "payload_dtype",
        BOTH,
    ),
    "FP8 as plain bytes": (lambda: as_bytes("fp8_e4m3", torch.uint8), "payload_dtype", (HOST,)),
    "MXFP8 as plain bytes": (lambda: as_bytes("mxfp8", torch.uint8), "payload_dtype", (HOST,)),
    "INT8 marked FP8": (lambda: as_bytes("fp8_e4m3", torch.int8), "payload_dtype", BOTH),
    "E5M2 marked E4M3": (
        lambda: changed(layer("fp8_e4m3"), "weight", weight().to(torch.float8_e5m2)),
        "payload_dtype",
        BOTH,
    ),
    "E5M2 under scaled_fp8": (lambda: legacy("fp8_e5m2"), "payload_dtype", (HOST,)),
    "FP8 payload marked INT8": (
        lambda: changed(layer("int8"), "weight", weight().to(torch.float8_e4m3fn)),
        "payload_dtype",
        BOTH,
    ),
    "marked weight with one dimension": (
        lambda: changed(layer("fp8_e4m3"), "weight", torch.ones(8).to(torch.float8_e4m3fn)),
        "payload_shape",
        BOTH,
    ),
    "rowwise FP8": (lambda: layer("fp8_e4m3_rowwise"), "unknown_format", (HOST,)),
    "convert_to_quant's hybrid_mxfp8": (
        lambda: renamed_format("hybrid_mxfp8"),
        "unknown_format",
        BOTH,
    ),
    "per-channel E5M2 without a marking": (
        lambda: changed(unmarked(layer("fp8_e5m2")), "weight_scale", ROWS[:, None]),
        "foreign_layout",
        (HOST,),
    ),
    "1-D scale marked rowwise": (
        lambda: changed(layer("fp8_e4m3_rowwise"), "weight_scale", ROWS),
        "scale_shape",
        (HOST,),
    ),
    "rotation that is no number": (
        lambda: layer("int8_convrot", convrot_groupsize=None),
        "scale_shape",
        BOTH,
    ),
    "marker without a format": (
        lambda: changed(layer("fp8_e4m3"), "comfy_quant", marker_tensor({"a": 1})),
        "unknown_format",
        BOTH,
    ),
    "INT8 without a marker": (lambda: unmarked(layer("int8")), "unmarked_integers", BOTH),
    "INT32 without a marker": (
        lambda: {f"{LAYER}.weight": torch.ones(8, 8, dtype=torch.int32)},
        "unmarked_integers",
        BOTH,
    ),
    "ModelOpt's NVFP4 as it is": (
        lambda: (unmarked(layer("nvfp4")), MODELOPT),
        "unmarked_integers",
        (HOST,),
    ),
    "ModelOpt's NVFP4, told by the order of its scales": (
        lambda: unmarked(flat(layer("nvfp4", weight(1024, 1024)))),
        "foreign_layout",
        (HOST,),
    ),
    "NVFP4 of an order that cannot be told": (
        lambda: unmarked(layer("nvfp4", torch.randn(256, 512))),
        "ambiguous_layout",
        (PACK,),
    ),
    "marker that is no JSON": (
        lambda: changed(layer("fp8_e4m3"), "comfy_quant", torch.full((4,), 255).byte()),
        "marker_unreadable",
        BOTH,
    ),
    "metadata that is no JSON": (
        lambda: (unmarked(layer("fp8_e4m3")), {"_quantization_metadata": "{"}),
        "marker_unreadable",
        BOTH,
    ),
    "metadata with a name for a layer": (
        lambda: (unmarked(layer("fp8_e4m3")), metadata({LAYER: "float8_e4m3fn"})),
        "marker_unreadable",
        BOTH,
    ),
    "marker without its weight": (
        lambda: {**changed(layer("fp8_e4m3"), "weight", None), "x.weight": torch.ones(2, 2)},
        "marker_without_weight",
        BOTH,
    ),
    "metadata of a layer that is not there": (
        lambda: (unmarked(layer("fp8_e4m3")), metadata({**FP8_LAYER, "blocks.7.ffn.0": {}})),
        "metadata_unknown_layer",
        (PACK,),
    ),
    "ModelOpt's metadata beside a marker": (
        lambda: (layer("nvfp4"), MODELOPT),
        "nibble_order_unknown",
        NOBODY,
    ),
    "diffusers' names": (lambda: DIFFUSERS, "diffusers_names", (HOST,)),
    "fused projections": (lambda: FUSED, "unsupported_layout", BOTH),
    "groups that do not divide a row": (
        lambda: layer("asym_w4a8_int8", group_size=24),
        "scale_shape",
        BOTH,
    ),
}


def inspected(path, tensors, meta=None):
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, meta)
    return inspect_file(str(path))


@pytest.mark.parametrize("what", BAD)
def test_bad_file_is_found_out(tmp_path, what):
    make, code, affects = BAD[what]
    made = make()
    tensors, meta = made if isinstance(made, tuple) else (made, None)
    problems = inspected(tmp_path / "m.safetensors", tensors, meta).problems
    found = {p.code: p for p in problems}
    assert code in found, problems
    assert found[code].affects == affects
    assert found[code].severity == ("error" if affects else "warning")
    assert found[code].detail and found[code].meaning and found[code].advice


def test_every_kind_of_problem_is_proved_by_a_bad_file():
    # `refused` is for what `stored_layers` refuses and no other kind names.
    assert {code for _, code, _ in BAD.values()} == KINDS.keys() - {"refused"}


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("shape", [(256, 512), (96, 256), (1024, 1024)])
def test_good_layer_has_no_problem_but_an_unknown_name(tmp_path, name, shape):
    report = inspected(tmp_path / "m.safetensors", layer(name, weight(*shape)))
    codes = [(p.code, p.affects) for p in report.problems]
    assert codes == ([] if formats.get(name).native else [("unknown_format", (HOST,))])


def test_good_files_of_others_have_no_problem(tmp_path):
    assert not inspected(tmp_path / "a.safetensors", legacy("fp8_e4m3")).problems
    report = inspected(tmp_path / "b.safetensors", unmarked(layer("fp8_e4m3")), metadata(FP8_LAYER))
    assert not report.problems


def test_bits_per_weight_are_the_formats(tmp_path):
    tensors = {**layer("nvfp4"), "norm.weight": torch.ones(512)}
    report = inspected(tmp_path / "m.safetensors", tensors)
    assert report.bits_quantized == pytest.approx(formats.get("nvfp4").bits, rel=1e-3)
    assert report.formats["nvfp4"].elements == 256 * 512
    assert report.bits == pytest.approx(report.size_bytes * 8 / (256 * 512 + 512))


def test_layers_with_one_problem_are_one_entry(tmp_path):
    tensors = unmarked(layer("fp8_e4m3"))
    more = {
        n.replace("blocks.0", f"blocks.{i}"): t.clone()
        for i in range(5)
        for n, t in tensors.items()
    }
    (problem,) = inspected(tmp_path / "m.safetensors", more).problems
    assert problem.layers == tuple(f"blocks.{i}.ffn.0" for i in range(5))


def test_payloads_are_not_read(tmp_path, monkeypatch):
    from lowbit.quant.checkpoint import Checkpoint

    read = Checkpoint.read

    def only_small(self, name):
        assert not name.endswith(".weight"), f"{name} was read"
        return read(self, name)

    monkeypatch.setattr(Checkpoint, "read", only_small)
    for name in formats.names():
        inspected(tmp_path / "m.safetensors", layer(name))


def test_swapped_nibbles_are_not_detectable(tmp_path):
    tensors = layer("nvfp4")
    swapped = changed(tensors, "weight", swap_nibbles(tensors[f"{LAYER}.weight"]))
    assert not inspected(tmp_path / "m.safetensors", swapped).problems


def test_one_shard_of_several_is_incomplete(tmp_path):
    report = inspected(tmp_path / "m-00001-of-00003.safetensors", wan_without())
    assert [p.code for p in report.problems] == ["incomplete"]
    assert "one of 3 shards" in report.problems[0].detail
    assert not inspected(tmp_path / "m-00001-of-00001.safetensors", wan_without()).problems


@pytest.mark.parametrize("marker", [{"format": ["x"]}, {}, {"format": None}])
def test_marker_without_a_known_name_is_a_problem_for_both(tmp_path, marker):
    tensors = changed(layer("int8"), "comfy_quant", marker_tensor(marker))
    report = inspected(tmp_path / "m.safetensors", tensors)
    assert {w for p in report.problems for w in p.affects} == set(BOTH)


def test_recorded_shape_that_is_none_is_ignored(tmp_path):
    for shape in (["a", "b"], [-5, 256], [256], None):
        record = {"_lowbit": json.dumps({"layers": {LAYER: {"shape": shape}}})}
        assert not inspected(tmp_path / "m.safetensors", layer("nvfp4"), record).problems
