import pytest

from lowbit.quant import families, formats, recipe
from tests.checkpoints import wan_shapes

EIGHT_BITS = [name for name in formats.names() if formats.get(name).bits >= 8]
FOUR_BITS = [name for name in formats.names() if formats.get(name).bits < 8]
# Deep enough that the rule for the ends of the stack holds.
DEEP = 12


@pytest.fixture(scope="module")
def wan():
    return families.recognise(wan_shapes(256, 512, DEEP, "t2v"))


@pytest.fixture(scope="module")
def unknown():
    return families.recognise({"layers.0.a.weight": (512, 512), "layers.1.a.weight": (512, 512)})


def choose(model, fmt, layer="blocks.5.self_attn.q", shape=(256, 256), name="auto", keep=()):
    return recipe.build(fmt, name, keep, model).choose(layer, shape)


def test_names_are_auto_the_families_and_none():
    assert recipe.names() == ("auto", *families.names(), "none")


@pytest.mark.parametrize("fmt", formats.names())
def test_auto_is_the_model_s_own_family(wan, unknown, fmt):
    for model in (wan, unknown):
        built = recipe.build(fmt, "auto", (), model)
        assert (built.family, built.blocks) == (model.family, model.blocks)
        assert built.format is formats.get(fmt)


def test_named_family_counts_the_blocks_its_own_way(wan, unknown):
    assert recipe.build("int8", "wan", (), wan).blocks == DEEP
    assert recipe.build("int8", "default", (), wan).family is families.get("default")
    assert recipe.build("int8", "wan", (), unknown).blocks == 0
    assert choose(unknown, "int8", "layers.0.a", (512, 512), "wan").format is None


@pytest.mark.parametrize("fmt", formats.names())
def test_middle_of_the_stack_takes_the_format(wan, fmt):
    choice = choose(wan, fmt)
    assert (choice.format, choice.reason) == (formats.get(fmt), "")


@pytest.mark.parametrize("fmt", formats.names())
@pytest.mark.parametrize("layer", ["head.head", "time_projection.1", "text_embedding.0"])
def test_family_keeps_what_it_never_quantizes_and_says_why(wan, fmt, layer):
    choice = choose(wan, fmt, layer)
    assert choice.format is None
    assert "never quantized" in choice.reason


@pytest.mark.parametrize("fmt", FOUR_BITS)
@pytest.mark.parametrize("block", [0, DEEP - 1])
def test_ends_of_the_stack_stay_in_the_most_exact_8_bits_that_fit(wan, fmt, block):
    layer = f"blocks.{block}.ffn.0"
    choice = choose(wan, fmt, layer)
    assert choice.format.name == "int8_convrot"
    assert choice.reason.startswith("8 bits: block")
    assert choose(wan, fmt, layer, (256, 100)).format.name == "fp8_e4m3"


@pytest.mark.parametrize("fmt", EIGHT_BITS)
@pytest.mark.parametrize("block", [0, DEEP - 1])
def test_8_bit_formats_take_the_ends_themselves(wan, fmt, block):
    assert choose(wan, fmt, f"blocks.{block}.ffn.0").format is formats.get(fmt)


def test_companions_hold_8_bits_and_the_last_takes_any_shape():
    companions = [formats.get(name) for name in recipe.EIGHT_BIT_FORMATS]
    assert all(fmt.bits == recipe.EIGHT_BITS for fmt in companions)
    assert companions[-1].unfit((1, 1)) is None
    errors = [fmt.max_error for fmt in companions]
    assert errors == sorted(errors)


@pytest.mark.parametrize("fmt", FOUR_BITS)
@pytest.mark.parametrize("shape", [(256,), (0, 256), (2, 2, 256)])
def test_shape_that_no_8_bit_format_takes_is_kept(wan, fmt, shape):
    assert choose(wan, fmt, "blocks.0.ffn.0", shape).format is None


@pytest.mark.parametrize("fmt", formats.names())
def test_shape_that_does_not_fit_is_kept_with_the_reason(wan, fmt):
    choice = choose(wan, fmt, shape=(256, 100))
    unfit = formats.get(fmt).unfit((256, 100))
    assert (choice.format is None) == (unfit is not None)
    assert choice.reason == (unfit or "")


@pytest.mark.parametrize("fmt", formats.names())
@pytest.mark.parametrize("layer", ["head.head", "text_embedding.0", "anything"])
def test_none_spares_nothing_but_what_was_asked(wan, fmt, layer):
    assert choose(wan, fmt, layer, name="none").format is formats.get(fmt)
    kept = choose(wan, fmt, layer, name="none", keep=["."])
    assert (kept.format, kept.reason) == (None, "kept as asked: .")


@pytest.mark.parametrize("name", ["auto", "wan", "none"])
def test_keep_is_searched_in_the_name_and_named_in_the_reason(wan, name):
    keep = [r"ffn\.0$", r"^blocks\.5\.self"]
    for layer, pattern in [("blocks.3.ffn.0", keep[0]), ("blocks.5.self_attn.q", keep[1])]:
        choice = choose(wan, "int8", layer, name=name, keep=keep)
        assert (choice.format, choice.reason) == (None, f"kept as asked: {pattern}")
    assert choose(wan, "int8", "blocks.3.ffn.2", name=name, keep=keep).format


def test_keep_may_be_any_iterable(wan):
    assert choose(wan, "int8", keep=(p for p in ["self_attn"])).format is None


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<n>a)(?P<n>b)"])
def test_malformed_pattern_is_named(wan, pattern):
    with pytest.raises(ValueError, match="is no regular expression") as error:
        recipe.build("int8", "auto", ["fine", pattern], wan)
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize("name", ["", "Wan", "flux"])
def test_unknown_recipe_lists_the_known(wan, name):
    with pytest.raises(ValueError, match=r"unknown recipe .*known are auto, .*none"):
        recipe.build("int8", name, (), wan)


def test_unknown_format_lists_the_known(wan):
    with pytest.raises(ValueError, match="unknown format 'int3'; known are"):
        recipe.build("int3", "auto", (), wan)


@pytest.mark.parametrize(("name", "kept"), [("nvfp4", True), ("mxfp8", True), ("int8", False)])
def test_layer_that_gives_the_model_its_width_is_not_padded(name, kept):
    """ComfyUI reads Wan's feed-forward width from the stored rows of this one layer."""
    model = families.recognise(wan_shapes(256, 1000, 2, "t2v"))
    rules = recipe.build(name, "auto", (), model)
    choice = rules.choose("blocks.0.ffn.0", (1000, 256))
    assert (choice.format is None) == kept
    assert not kept or "width" in choice.reason
    assert rules.choose("blocks.1.ffn.0", (1000, 256)).format


def test_diffusers_named_flux_is_refused():
    shapes = {
        "x_embedder.weight": (3072, 64),
        "single_transformer_blocks.0.attn.norm_k.weight": (128,),
        **{f"transformer_blocks.{i}.attn.to_q.weight": (512, 512) for i in range(3)},
    }
    model = families.recognise(shapes)
    assert "diffusers" in model.family.refused(model.renamed.values())
