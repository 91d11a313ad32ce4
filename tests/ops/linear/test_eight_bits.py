"""Which 8 bits W4A8 takes for a layer under `w4a8_exact`: what is computed, and what it decides."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from lowbit.ops import registry
from lowbit.ops.linear import OP, _check_act, linear, quantize_activation, w4a8, with_arithmetic
from lowbit.ops.linear import eight_bits as module
from lowbit.ops.linear.activation import Kind, kind_on, takes
from lowbit.ops.linear.arithmetic import EXACT, arithmetic_of
from lowbit.ops.linear.eight_bits import eight_bit_errors, least_error
from lowbit.ops.linear.four_bit import EIGHT_BITS, GROUPS, W4A8_FP8, W4A8_INT8, four_bit
from lowbit.quant import formats

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NAMES = [name for name in formats.names() if formats.get(name).layout.scheme in GROUPS]


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outliers(m: int, k: int) -> torch.Tensor:
    x = make(m, k, seed=3)
    x[:, ::97] *= 10
    return x


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(300, 512), (33, 250), (1, 16)])
def test_errors_are_those_of_the_weights_that_w4a8_multiplies(name, n, k, monkeypatch):
    """In pieces of 128 rows, against the identity multiplied by the weight's new bits."""
    weight = formats.get(name).quantize(make(n, k) * 0.02)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1)
    got, want = eight_bit_errors(weight), weight.dequantize()
    for arithmetic, dtype in EIGHT_BITS.items():
        kind = Kind(dtype, 256 if dtype == torch.int8 and k % 256 == 0 else 0)
        # One 1 in each token is exact in FP8; INT8 adds no error that is not its own.
        tokens = quantize_activation(torch.eye(k), weight, kind=kind, backend="reference")
        values = w4a8.run_quantized(tokens, weight, None, "reference").t()
        assert got[arithmetic] == pytest.approx(error(values, want), abs=1e-6, rel=0.02)


def test_errors_are_those_that_the_formats_have():
    """NVFP4: in E4M3 by 1.5 · 2^k, in INT8 0.9 to 3%; MXFP4 is exact in E4M3."""
    shapes = {"gaussian": make(256, 1024), "outlier columns": outliers(256, 1024)}
    for weight in shapes.values():
        of_nvfp4 = eight_bit_errors(formats.get("nvfp4").quantize(weight))
        assert 0.011 <= of_nvfp4[W4A8_FP8] <= 0.018
        assert 0.006 <= of_nvfp4[W4A8_INT8] <= 0.03
        of_mxfp4 = eight_bit_errors(formats.get("mxfp4").quantize(weight))
        assert of_mxfp4[W4A8_FP8] == 0 < of_mxfp4[W4A8_INT8]


def test_a_scale_of_nan_is_refused_and_zeros_err_by_nothing():
    weight = formats.get("nvfp4").quantize(torch.zeros(4, 64))
    assert eight_bit_errors(weight) == {W4A8_FP8: 0, W4A8_INT8: 0}
    weight._params.block_scale.view(torch.uint8).reshape(-1)[0] = 0x7F
    with pytest.raises(ValueError, match=r"holds NaN.* Convert the layer again, or choose w4a8"):
        eight_bit_errors(weight)


def test_a_scale_that_overflows_is_refused():
    """Errors of NaN would be compared, and the first name taken."""
    weight = formats.get("mxfp4").quantize(make(64, 256))
    weight._params.scale.view(torch.uint8).reshape(-1)[3] = 254
    with pytest.raises(ValueError, match="NaN or Inf, a block scale is corrupt"):
        least_error(weight, CPU)


def test_scales_of_other_rows_than_the_weight_are_no_reason_to_skip_some(monkeypatch):
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1)
    w = four_bit(formats.get("nvfp4").quantize(make(300, 64)))
    short = dataclasses.replace(w, scale=w.scale.reshape(-1)[:-512])
    with pytest.raises(ValueError, match="shorter"):
        list(module._pieces(short, CPU))


def test_what_is_taken_for_the_activation_is_what_it_errs_by():
    """On tokens with outlier channels, as the docstring says; a tenth of room for other seeds."""
    x = outliers(128, 5120)
    weight = formats.get("nvfp4").quantize(make(16, 5120))
    for kind, taken in (
        (Kind(torch.float8_e4m3fn, 0), module.FP8_ACTIVATION),
        (Kind(torch.int8, 256), module.ROTATED_ACTIVATION),
        (Kind(torch.int8, 0), module.INT8_ACTIVATION),
    ):
        rounded = quantize_activation(x, weight, kind=kind, backend="reference").dequantize()
        assert error(rounded, x) == pytest.approx(taken, rel=0.1)


def spiked(n: int, k: int) -> torch.Tensor:
    """Rows with one block of 256 that is 200 times as large as the rest.

    There INT8, with one step for a row, loses what E4M3 keeps.
    """
    weight = make(n, k) * 0.01
    weight[:, :256] *= 200
    return weight


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("weight", "taken"),
    [
        (make(64, 1024), W4A8_INT8),
        # Not rotated: outlier channels of the activation cost INT8 more.
        (make(64, 1000), W4A8_FP8),
        (spiked(16, 13824), W4A8_FP8),
    ],
    ids=["rotated", "not rotated", "rows of two sizes"],
)
def test_the_choice_is_the_one_that_errs_less_in_the_output(name, weight, taken):
    four, x = formats.get(name).quantize(weight), outliers(200, weight.shape[1])
    want, wrong = F.linear(x.double(), four.dequantize().double()), {}
    for arithmetic in EIGHT_BITS:
        kind = kind_on(CPU, four, 512, arithmetic)
        tokens = quantize_activation(x, four, kind=kind, backend="reference")
        wrong[arithmetic] = error(w4a8.run_quantized(tokens, four, None, "reference"), want)
    assert least_error(four) == min(wrong, key=wrong.get) == taken


def test_a_weight_that_int8_holds_badly_goes_to_fp8(monkeypatch):
    weight = formats.get("mxfp4").quantize(make(64, 1024))
    assert least_error(weight) == W4A8_INT8
    for int8, taken in ((0.024, W4A8_INT8), (0.025, W4A8_FP8)):
        errors = {W4A8_FP8: 0.0, W4A8_INT8: int8}
        monkeypatch.setattr(module, "eight_bit_errors", lambda *given, e=errors: e)
        # .024² + .009² < .026² < .025² + .009².
        assert least_error(weight) == taken


def test_where_there_is_no_fp8_nothing_is_computed(monkeypatch):
    monkeypatch.setattr(registry, "capability", lambda device: (8, 6))
    monkeypatch.setattr(module, "eight_bit_errors", None)
    assert least_error(formats.get("nvfp4").quantize(make(64, 1000)), CUDA) == W4A8_INT8


def test_the_question_is_answered_once_and_the_answer_stays_with_the_weight(monkeypatch):
    asked = []
    real = module.eight_bit_errors
    monkeypatch.setattr(module, "eight_bit_errors", lambda *g: asked.append(g[1]) or real(*g))
    weight = with_arithmetic(formats.get("nvfp4").quantize(make(64, 1024)), EXACT, CPU)
    moved = [weight, weight.clone(), weight.to(torch.float16)]
    # As ComfyUI does after a LoRA.
    values = weight.dequantize()
    moved += [weight.requantize_from_float(values, scale="recalculate", stochastic_rounding=3)]
    assert [arithmetic_of(w) for w in moved] == [W4A8_INT8] * 4
    assert asked == [CPU]


def test_a_named_kind_is_the_only_one_that_is_multiplied():
    plain = formats.get("nvfp4").quantize(make(64, 1024))
    fp8, int8 = Kind(torch.float8_e4m3fn, 0), Kind(torch.int8, 256)
    for arithmetic, own, other in ((W4A8_FP8, fp8, int8), (W4A8_INT8, int8, fp8)):
        weight = with_arithmetic(plain, arithmetic)
        assert quantize_activation(make(3, 1024), weight).kind == own
        assert takes(weight, own) and not takes(weight, other)
        assert takes(plain, own, arithmetic) and not takes(plain, other, arithmetic)
        with pytest.raises(ValueError, match="do not multiply"):
            quantize_activation(make(3, 1024), weight, kind=other)
        given = quantize_activation(make(3, 1024), plain, kind=other)
        with pytest.raises(ValueError, match="the weight multiplies Kind"):
            _check_act(given, plain, None, arithmetic)
        # What dequantizes both takes any.
        assert linear(given, weight, backend="reference").shape == (3, 64)


def test_named_kinds_run_when_named_only_and_fp8_where_it_is(monkeypatch):
    monkeypatch.setattr(registry, "_has_package", lambda name: True)
    monkeypatch.setattr(registry, "_wrong_version", lambda needs: None)
    for capability in ((8, 6), (9, 0)):
        monkeypatch.setattr(registry, "capability", lambda device, has=capability: has)
        call = registry.Call("nvfp4", torch.device("cuda", capability[1]), 1040, 1280)
        assert registry.select(OP, call, W4A8_INT8).name == W4A8_INT8
        assert registry.select(OP, call).name not in EIGHT_BITS
        if capability == (9, 0):
            assert registry.select(OP, call, W4A8_FP8).name == W4A8_FP8
            continue
        with pytest.raises(registry.NoBackendError, match=r"needs compute capability \(8, 9\)"):
            registry.select(OP, call, W4A8_FP8)
