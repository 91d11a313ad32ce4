"""The `format` input, which workflows hold: its options and what it is by itself."""

from lowbit.nodes.load_diffusion_model import LowBitLoadDiffusionModel
from lowbit.nodes.quantize_model import LowBitQuantizeModel
from lowbit.nodes.quantize_wanvideo import LowBitQuantizeWanVideo
from lowbit.quant import formats


def test_loader_offers_it_first_and_the_quantizer_does_not():
    """The quantizer has nothing to leave as it is in what nobody quantized."""
    options, settings = LowBitLoadDiffusionModel.INPUT_TYPES()["required"]["format"]
    assert options == ["auto", "as_stored", *formats.names()]
    assert settings["default"] == "auto"
    options, _ = LowBitQuantizeModel.INPUT_TYPES()["required"]["format"]
    assert options == ["as_stored", *formats.names()]


def test_arithmetic_may_be_missing_in_older_workflows():
    for node in (LowBitLoadDiffusionModel, LowBitQuantizeModel, LowBitQuantizeWanVideo):
        options, settings = node.INPUT_TYPES()["optional"]["arithmetic"]
        assert options == [
            *("auto", "w4a16", "w4a8", "native"),
            *("w4a8_exact", "w4a8_fp8", "w4a8_int8"),
        ]
        assert settings["default"] == "auto"
