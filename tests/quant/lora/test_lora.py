"""LoRA files of every dialect are read as the same LoRA; what is none is refused by name."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from lowbit.quant import families, lora
from lowbit.quant.checkpoint import Checkpoint
from lowbit.quant.lora.names import Names

WAN = families.get("wan")
QWEN = families.get("qwen_image")
SHAPES = {
    "blocks.0.self_attn.q": (32, 16),
    "blocks.0.cross_attn.k_img": (32, 16),
    "blocks.0.ffn.0": (64, 16),
    "blocks.11.ffn.2": (16, 64),
    "blocks.0.norm3": (16,),
    "patch_embedding": (16, 4, 1, 2, 2),
    "blocks.0.modulation": (1, 6, 16),
}
PARAMETERS = {
    **{p if p.endswith("modulation") else f"{p}.weight": shape for p, shape in SHAPES.items()},
    "blocks.0.ffn.0.bias": (64,),
}
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
# Name of the layer in the file, ends of its two matrices, the host's name.
DIALECTS = [
    ("lora_unet_blocks_0_self_attn_q", KOHYA, "blocks.0.self_attn.q"),
    ("lora_unet__blocks_0_cross_attn_k_img", KOHYA, "blocks.0.cross_attn.k_img"),
    ("lycoris_blocks_11_ffn_2", KOHYA, "blocks.11.ffn.2"),
    ("lycoris_blocks_0_ffn_net_0_proj", KOHYA, "blocks.0.ffn.0"),
    ("lycoris_blocks_11_ffn_net_2", KOHYA, "blocks.11.ffn.2"),
    ("lora_unet_blocks_0_attn1_to_q", KOHYA, "blocks.0.self_attn.q"),
    ("lora_transformer_blocks_0_attn2_add_k_proj", KOHYA, "blocks.0.cross_attn.k_img"),
    ("diffusion_model.blocks.0.ffn.0", KOHYA, "blocks.0.ffn.0"),
    ("diffusion_model.blocks.0.ffn.0", PEFT, "blocks.0.ffn.0"),
    ("blocks.0.ffn.0", ("lora_A.default.weight", "lora_B.default.weight"), "blocks.0.ffn.0"),
    ("blocks.0.ffn.0", ("lora_A", "lora_B"), "blocks.0.ffn.0"),
    ("base_model.model.blocks.0.ffn.0", PEFT, "blocks.0.ffn.0"),
    ("transformer.blocks.0.attn1.to_q", PEFT, "blocks.0.self_attn.q"),
    ("transformer.blocks.0.attn2.add_k_proj", PEFT, "blocks.0.cross_attn.k_img"),
    ("base_model.model.transformer.blocks.0.ffn.net.0.proj", PEFT, "blocks.0.ffn.0"),
    ("blocks.11.ffn.net.2", ("lora.down.weight", "lora.up.weight"), "blocks.11.ffn.2"),
    ("diffusion_model.patch_embedding", KOHYA, "patch_embedding"),
    ("unet.named.by.the.host", PEFT, "blocks.0.ffn.0"),
]
ALIASES = {"unet.named.by.the.host": "blocks.0.ffn.0"}


def parse(path, tensors, metadata=None, family=WAN, places=tuple(SHAPES)):
    save_file(tensors, path, metadata)
    checkpoint = Checkpoint(path)
    return checkpoint, lora.parse(checkpoint, places, family, ALIASES)


def pair(place: str, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    n, *inputs = SHAPES[place]
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rank, *inputs, generator=generator),
        torch.randn(n, rank, *[1] * (len(inputs) - 1), generator=generator),
    )


@pytest.mark.parametrize(("name", "ends", "place"), DIALECTS)
def test_dialects_name_one_layer(tmp_path, name, ends, place):
    down, up = pair(place)
    tensors = {f"{name}.{end}": value for end, value in zip(ends, (down, up), strict=True)}
    tensors[f"{name}.alpha"] = torch.tensor(2.0)
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    ((found, layer),) = lora.read(checkpoint, parsed, PARAMETERS)
    assert found == place and parsed.unknown == ()
    assert torch.equal(layer.down, down)
    assert torch.equal(layer.up, up.reshape(-1, 4))
    assert layer.scale == 0.5 and layer.bias is None


def test_qwen_image_in_peft_and_musubis_names(tmp_path):
    places = ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.img_mlp.net.0.proj")
    names = (
        "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight",
        "lora_unet_transformer_blocks_0_img_mlp_net_0_proj.lora_down.weight",
        "lora_unet_transformer_blocks_0_img_mlp_net_0_proj.lora_up.weight",
    )
    tensors = {name: torch.ones(4, 4) for name in names}
    _, parsed = parse(tmp_path / "lora.safetensors", tensors, None, QWEN, places)
    assert set(parsed.pairs) == set(places) and parsed.unknown == ()


def test_ranks_differ_and_biases_go_with_their_layer(tmp_path):
    tensors = {}
    for rank, place in ((2, "blocks.0.ffn.0"), (8, "blocks.11.ffn.2")):
        for end, value in zip(KOHYA, pair(place, rank), strict=True):
            tensors[f"diffusion_model.{place}.{end}"] = value
    tensors["diffusion_model.blocks.0.ffn.0.diff_b"] = torch.full((64,), 3.0)
    tensors["diffusion_model.blocks.0.norm3.diff"] = torch.ones(16)
    tensors["diffusion_model.blocks.0.modulation.diff"] = torch.ones(1, 6, 16)
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    layers = dict(lora.read(checkpoint, parsed, PARAMETERS))
    assert {name: layer.down.shape[0] for name, layer in layers.items()} == {
        "blocks.0.ffn.0": 2,
        "blocks.11.ffn.2": 8,
    }
    assert torch.equal(layers["blocks.0.ffn.0"].bias, torch.full((64,), 3.0))
    assert layers["blocks.0.ffn.0"].scale == 1.0
    assert set(parsed.diffs) == {"blocks.0.norm3", "blocks.0.modulation"}


def test_every_name_of_diffusers_is_known_with_underscores_too():
    """In each rename of the family, both ways lead to one layer."""
    inner = ["self_attn.q", "cross_attn.v_img", "cross_attn.norm_k_img", "ffn.0", "ffn.2", "norm3"]
    theirs = {
        "blocks.3.attn1.to_q": "blocks.3.self_attn.q",
        "blocks.3.attn1.to_out.0": "blocks.3.self_attn.o",
        "blocks.12.attn2.add_v_proj": "blocks.12.cross_attn.v_img",
        "blocks.12.attn2.norm_added_k": "blocks.12.cross_attn.norm_k_img",
        "blocks.12.norm2": "blocks.12.norm3",
        "blocks.12.scale_shift_table": "blocks.12.modulation",
        "vace_blocks.1.proj_in": "vace_blocks.1.before_proj",
        "vace_blocks.1.ffn.net.2": "vace_blocks.1.ffn.2",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.time_proj": "time_projection.1",
        "scale_shift_table": "head.modulation",
        "proj_out": "head.head",
    }
    places = {*theirs.values(), *(f"blocks.{i}.{end}" for i in (1, 11) for end in inner)}
    known = Names(places, WAN, {}, {})
    for name, place in theirs.items():
        assert known.resolve(name) == place
        assert known.resolve(f"lora_unet_{name.replace('.', '_')}") == place
    for place in places:
        assert known.resolve(f"lora_unet_{place.replace('.', '_')}") == place
    assert known.resolve("lora_unet_blocks_99_attn1_to_q") is None


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.diff_m",
        "blocks.0.diff_m",
        "blocks.0.modulation.diff",
        "blocks.0.scale_shift_table.diff",
        "lora_unet_blocks_0_modulation.diff",
        "lora_unet_blocks_0.diff_m",
    ],
)
def test_difference_of_a_blocks_modulation(tmp_path, name):
    """LightX2V writes it as `diff_m` of the block."""
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", {name: torch.ones(1, 6, 16)})
    assert parsed.diffs == {"blocks.0.modulation": name} and parsed.unknown == ()
    assert lora.fitting(checkpoint, parsed, PARAMETERS) == (parsed, ())


@pytest.mark.parametrize(
    "alpha",
    [torch.ones(3), torch.ones(0), torch.tensor(float("nan")), torch.tensor([-float("inf")])],
)
def test_alpha_that_is_not_one_finite_number_is_refused(tmp_path, alpha):
    tensors = dict(zip([f"blocks.0.ffn.0.{e}" for e in KOHYA], pair("blocks.0.ffn.0"), strict=True))
    tensors["blocks.0.ffn.0.alpha"] = alpha
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(lora.LoraError, match=r"blocks\.0\.ffn\.0\.alpha .* one finite number"):
        dict(lora.read(checkpoint, parsed, PARAMETERS))


def of_ranks(ranks):
    """A LoRA file's tensors. ranks: layer -> rank."""
    return {
        f"{place}.{end}": value
        for place, rank in ranks.items()
        for end, value in zip(KOHYA, pair(place, rank), strict=True)
    }


def with_differences() -> dict[str, torch.Tensor]:
    """A LoRA file's tensors: a pair, a bias and a difference."""
    return {
        **of_ranks({"blocks.0.ffn.0": 4}),
        "blocks.0.ffn.0.diff_b": torch.ones(64),
        "blocks.0.modulation.diff": torch.ones(1, 6, 16),
        "blocks.0.ffn.0.alpha": torch.tensor(4),
    }


OF_FLOATS = [name for name in with_differences() if not name.endswith("alpha")]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("name", OF_FLOATS)
def test_numbers_that_are_no_floats_are_refused(tmp_path, name, dtype):
    """As of a LoRA that somebody has quantized, whose scales nobody knows."""
    tensors = with_differences()
    tensors[name] = tensors[name].to(dtype)
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(lora.LoraError, match=f"{name} is of {dtype}"):
        lora.fitting(checkpoint, parsed, PARAMETERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_all_floats_are_read(tmp_path, dtype):
    tensors = {name: value.to(dtype) for name, value in with_differences().items()}
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    parsed, _ = lora.fitting(checkpoint, parsed, PARAMETERS)
    ((_, layer),) = lora.read(checkpoint, parsed, PARAMETERS)
    assert torch.equal(layer.down, tensors["blocks.0.ffn.0.lora_down.weight"])


@pytest.mark.parametrize("end", ["scale_weight", "weight_scale", "weight_scale_2", "scale"])
@pytest.mark.parametrize("ends", [KOHYA, PEFT, ("lora_A", "lora_B")])
def test_scales_of_matrices_are_refused(tmp_path, ends, end):
    tensors = {
        f"blocks.0.ffn.0.{e}": value.to(torch.float8_e4m3fn)
        for e, value in zip(ends, pair("blocks.0.ffn.0"), strict=True)
    }
    tensors[f"blocks.0.ffn.0.{ends[1].removesuffix('.weight')}.{end}"] = torch.ones(())
    with pytest.raises(lora.LoraError, match=rf"{end} is a scale of .*{ends[1]}; .*in 16 bits"):
        parse(tmp_path / "lora.safetensors", tensors)


def test_scales_of_what_fits_no_layer_are_left_out_with_it(tmp_path):
    tensors = of_ranks({"blocks.0.ffn.0": 4})
    more = [f"elsewhere.0.lora_down.{end}" for end in ("weight", "scale_weight")]
    more += ["blocks.0.ffn.0.scale_weight"]
    _, parsed = parse(
        tmp_path / "lora.safetensors", {**tensors, **{name: torch.ones(1) for name in more}}
    )
    assert set(parsed.unknown) == set(more)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.nan, torch.float32),
        (torch.inf, torch.bfloat16),
        (-torch.inf, torch.float16),
        (torch.nan, torch.float8_e4m3fn),
        (torch.inf, torch.float8_e5m2),
        # Finite as it is stored, not as it is computed with.
        (1e300, torch.float64),
    ],
)
@pytest.mark.parametrize("name", [name for name in OF_FLOATS if "modulation" not in name])
def test_numbers_that_are_not_finite_are_refused(tmp_path, name, value, dtype):
    tensors = with_differences()
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[-1] = value
    tensors[name] = tensors[name].to(dtype)
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    parsed, _ = lora.fitting(checkpoint, parsed, PARAMETERS)
    with pytest.raises(lora.LoraError, match=rf"lora\.safetensors: {name} holds NaN or Inf"):
        dict(lora.read(checkpoint, parsed, PARAMETERS))


def test_rank_0_adds_nothing_and_is_left_out(tmp_path, caplog):
    tensors = of_ranks({"blocks.0.ffn.0": 0, "patch_embedding": 0, "blocks.11.ffn.2": 4})
    tensors["blocks.0.ffn.0.diff_b"] = torch.ones(64)
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    with caplog.at_level(logging.INFO):
        parsed, left = lora.fitting(checkpoint, parsed, PARAMETERS)
    assert "rank 0, which adds nothing, left out: blocks.0.ffn.0.lora_down.weight" in caplog.text
    assert [place for place, _ in lora.read(checkpoint, parsed, PARAMETERS)] == ["blocks.11.ffn.2"]
    assert set(parsed.biases) == {"blocks.0.ffn.0"} and left == ()


def test_file_of_nothing_but_rank_0_is_refused(tmp_path):
    tensors = of_ranks({"blocks.0.ffn.0": 0, "blocks.11.ffn.2": 0})
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(lora.LoraError, match=r"blocks\.0\.ffn\.0\.lora_down\.weight is of rank 0"):
        lora.fitting(checkpoint, parsed, PARAMETERS)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((0, 16), (64, 4)),
        ((4, 16), (64, 0)),
        ((0, 16), (64, 4, 0)),
        ((0, 17), (64, 0)),
        ((0, 16), (63, 0)),
        ((0, 16), (64,)),
        ((0,), (64, 0)),
        ((), (64, 0)),
    ],
)
@pytest.mark.parametrize("more", [{"blocks.11.ffn.2": 4}, {}])
def test_rank_0_of_no_pair_for_the_layer_is_refused(tmp_path, down, up, more):
    tensors = of_ranks(more)
    for end, shape in zip(KOHYA, (down, up), strict=True):
        tensors[f"blocks.0.ffn.0.{end}"] = torch.ones(shape)
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(lora.LoraError, match=r"malformed: .*no pair for blocks\.0\.ffn\.0\.weight"):
        lora.fitting(checkpoint, parsed, PARAMETERS)


def test_rank_0_in_a_file_of_another_model_is_not_what_is_told(tmp_path):
    tensors = of_ranks({"blocks.0.ffn.0": 0, "blocks.11.ffn.2": 4})
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    larger = {name: tuple(2 * size for size in shape) for name, shape in PARAMETERS.items()}
    with pytest.raises(lora.LoraError, match=r"of another model: .*; blocks\.11\.ffn\.2\.weight"):
        lora.fitting(checkpoint, parsed, larger)


def test_alpha_of_diffusers_header_counts(tmp_path):
    tensors = dict(zip([f"blocks.0.ffn.0.{e}" for e in PEFT], pair("blocks.0.ffn.0"), strict=True))
    settings = {"transformer.lora_alpha": 8, "transformer.r": 4}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors, metadata)
    assert dict(lora.read(checkpoint, parsed, PARAMETERS))["blocks.0.ffn.0"].scale == 2.0
    metadata = {"lora_adapter_metadata": json.dumps({**settings, "transformer.use_rslora": True})}
    with pytest.raises(lora.LoraError, match="use_rslora"):
        parse(tmp_path / "other.safetensors", tensors, metadata)


@pytest.mark.parametrize("own", ["transformer.lora_alpha", "lora_alpha", "unet.lora_alpha"])
def test_alpha_of_a_text_encoder_is_not_the_models(tmp_path, own):
    tensors = dict(zip([f"blocks.0.ffn.0.{e}" for e in PEFT], pair("blocks.0.ffn.0"), strict=True))
    others = {"text_encoder.lora_alpha": 64, "text_encoder_2.use_rslora": True}
    for settings in ({own: 8, **others}, {**others, own: 8}):
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
        _, parsed = parse(tmp_path / "lora.safetensors", tensors, metadata)
        assert parsed.alpha == 8.0
    metadata = {"lora_adapter_metadata": json.dumps(others)}
    assert parse(tmp_path / "lora.safetensors", tensors, metadata)[1].alpha is None


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[]", "is no object"),
        ("{", "is malformed, no JSON"),
        ("[" * 10**5, "is malformed"),
        ('{"transformer.lora_alpha": "8"}', "a number is wanted"),
        ('{"transformer.lora_alpha": NaN}', "a number is wanted"),
        pytest.param('{"lora_alpha": 1%s}' % ("0" * 400), "a number is wanted", id="1e400"),
        ('{"transformer.lora_alpha": 8, "lora_alpha": 4}', "several alphas"),
    ],
)
def test_header_without_one_alpha_is_refused(tmp_path, header, message):
    tensors = dict(zip([f"blocks.0.ffn.0.{e}" for e in PEFT], pair("blocks.0.ffn.0"), strict=True))
    with pytest.raises(lora.LoraError, match=message):
        parse(tmp_path / "lora.safetensors", tensors, {"lora_adapter_metadata": header})


def test_what_fits_no_layer_is_told(tmp_path):
    down, up = pair("blocks.0.ffn.0")
    tensors = {"blocks.0.ffn.0.lora_down.weight": down, "blocks.0.ffn.0.lora_up.weight": up}
    tensors["img_emb.proj.1.lora_down.weight"] = down.clone()
    _, parsed = parse(tmp_path / "lora.safetensors", tensors)
    assert parsed.unknown == ("img_emb.proj.1.lora_down.weight",)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (["dora_scale"], "DoRA"),
        (["lora_magnitude_vector.default.weight"], "DoRA"),
        (["hada_w1_a"], "LoHa"),
        (["lokr_w2"], "LoKr"),
        (["oft_blocks"], "OFT"),
        (["a1.weight"], "GLoRA"),
        (["lora_mid.weight"], "middle matrix"),
        (["set_weight"], "replaces weights"),
        (["lora_B.bias"], "bias of its own"),
        (["lora_up.weight"], "one matrix of the two"),
    ],
)
def test_what_is_no_lora_is_refused_by_name(tmp_path, ends, message):
    tensors = {f"diffusion_model.blocks.0.ffn.0.{end}": torch.ones(2, 2) for end in ends}
    with pytest.raises(lora.LoraError, match=message):
        parse(tmp_path / "lora.safetensors", tensors)


def test_two_names_of_one_layer_and_other_models_are_refused(tmp_path):
    down, up = pair("blocks.0.ffn.0")
    one = {"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up}
    two = {f"transformer.{name}": value.clone() for name, value in one.items()}
    with pytest.raises(lora.LoraError, match="are of one layer"):
        parse(tmp_path / "twice.safetensors", one | two)
    with pytest.raises(lora.LoraError, match="nothing in it fits this model"):
        parse(tmp_path / "none.safetensors", {"unet.down_blocks.0.lora_A.weight": down})
    with pytest.raises(lora.LoraError, match=r"it holds blocks\.0\.ffn\.0\.alpha, …"):
        parse(tmp_path / "alpha.safetensors", {"blocks.0.ffn.0.alpha": torch.ones(())})
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", one)
    other = {**PARAMETERS, "blocks.0.ffn.0.weight": (64, 24)}
    with pytest.raises(lora.LoraError, match=r"of another model: .*blocks\.0\.ffn\.0"):
        lora.fitting(checkpoint, parsed, other)


def test_what_has_other_shapes_is_left_out_and_named(tmp_path):
    """A LoRA of text to video for a model of image to video, whose first layer is wider."""
    tensors = {}
    for place in ("patch_embedding", "blocks.0.ffn.0", "blocks.11.ffn.2"):
        for end, value in zip(KOHYA, pair(place), strict=True):
            tensors[f"diffusion_model.{place}.{end}"] = value
    tensors["diffusion_model.blocks.0.ffn.0.diff_b"] = torch.ones(64)
    # Where the layer has no bias, where it has another norm, where it has another modulation.
    tensors["diffusion_model.blocks.11.ffn.2.diff_b"] = torch.ones(16)
    tensors["diffusion_model.blocks.0.norm3.diff"] = torch.ones(24)
    tensors["diffusion_model.blocks.0.modulation.diff"] = torch.ones(1, 2, 16)
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    shapes = {**PARAMETERS, "patch_embedding.weight": (16, 9, 1, 2, 2)}
    found, left = lora.fitting(checkpoint, parsed, shapes)
    assert set(found.pairs) == {"blocks.0.ffn.0", "blocks.11.ffn.2"}
    assert set(found.biases) == {"blocks.0.ffn.0"} and found.diffs == {}
    assert set(left) == {
        "patch_embedding.weight",
        "blocks.11.ffn.2.bias",
        "blocks.0.norm3.weight",
        "blocks.0.modulation",
    }
    assert set(dict(lora.read(checkpoint, found, shapes))) == set(found.pairs)


@pytest.mark.parametrize("bad", ["down", "up", "rank"])
def test_each_size_of_a_pair_counts(tmp_path, bad):
    n, k, rank = (65 if bad == "up" else 64), (17 if bad == "down" else 16), 4
    down, up = torch.ones(rank, k), torch.ones(n, rank + (bad == "rank"))
    tensors = {"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up}
    checkpoint, parsed = parse(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(lora.LoraError, match="of another model"):
        lora.fitting(checkpoint, parsed, PARAMETERS)


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model.transformer."])
def test_part_of_a_fused_layer_is_refused(tmp_path, prefix):
    down, up = pair("blocks.0.ffn.0")
    one = {"blocks.0.ffn.0.lora_A.weight": down, "blocks.0.ffn.0.lora_B.weight": up}
    part = {f"{prefix}layers.0.to_q.lora_A.weight": down.clone()}
    save_file(one | part, tmp_path / "lora.safetensors")
    checkpoint = Checkpoint(tmp_path / "lora.safetensors")
    parts = {"layers.0.to_q": "layers.0.qkv", "transformer.layers.0.to_q": "layers.0.qkv"}
    with pytest.raises(lora.LoraError, match=r"layers\.0\.qkv.*ComfyUI's own LoRA loader"):
        lora.parse(checkpoint, SHAPES, WAN, {}, parts)
