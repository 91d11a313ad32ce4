"""4-bit weights decoded: every byte, every scale, the swizzle, errors of what E4M3 cannot hold."""

import pytest
import torch
from comfy_kitchen.float_utils import from_blocked
from comfy_kitchen.tensor import QuantizedTensor

from lowbit.ops.decode_fp4 import decode_fp4, decode_fp4_e4m3, reference
from lowbit.quant import formats

E4M3 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The byte of an E4M3 scale of 1, and of an E8M0 one.
ONE = {16: 0x38, 32: 127}
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def swizzled(plain: torch.Tensor) -> torch.Tensor:
    """Scales [N, C] bytes, at the places that the formula gives; padding is poisoned."""
    rows, columns = plain.shape
    wide = -(-columns // 4)
    out = torch.full((-(-rows // 128) * wide * 512,), 0x7E, dtype=torch.uint8)
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    block = r // 128 * wide + c // 4
    out[512 * block + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = plain
    return out


def packed_of(codes: torch.Tensor) -> torch.Tensor:
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def weight_of(n: int, k: int, seed: int = 0):
    """(weight, packed, scales, tensor scale) of a random NVFP4 weight."""
    weight = formats.get("nvfp4").quantize(make(n, k, seed=seed) * 0.02)
    params = weight._params
    return weight, weight._qdata, params.block_scale, params.scale


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 32])
def test_all_bytes_give_their_two_values(dtype, group):
    packed = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    scale = swizzled(torch.full((1, 512 // group), ONE[group], dtype=torch.uint8))
    got = decode_fp4(packed, scale, (1, 512), group, dtype)
    values = [*MAGNITUDES, *(-m for m in MAGNITUDES)]
    want = [values[nibble] for byte in range(256) for nibble in (byte >> 4, byte & 15)]
    assert got.dtype == dtype and got[0].tolist() == want


def test_swizzle_is_the_formula_and_comfy_kitchens():
    plain = torch.randint(0, 256, (150, 9), dtype=torch.uint8)
    stored = swizzled(plain)
    assert torch.equal(reference.unswizzle(stored, 150, 9), plain)
    assert torch.equal(from_blocked(stored.reshape(256, 12), num_rows=150, num_cols=9), plain)


@pytest.mark.parametrize(("n", "k"), [(64, 64), (33, 250), (1, 1), (300, 1040)])
def test_decoded_weight_is_comfy_kitchens_up_to_the_scale_of_the_tensor(n, k):
    weight, packed, scale, tensor_scale = weight_of(n, k)
    got = decode_fp4(packed, scale, (n, k), 16, torch.float32)
    assert got.shape == (n, 2 * packed.shape[1])
    # Two roundings to float32, of what is multiplied in another order.
    torch.testing.assert_close(got[:, :k] * tensor_scale, weight.dequantize(), rtol=3e-7, atol=0)
    assert not got[:, k:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_scale_times_every_code_is_exact_in_16_bits(dtype):
    """Zero, subnormal and the largest among them; NaN gives NaN."""
    packed = packed_of(torch.arange(16, dtype=torch.uint8).expand(128, 16).contiguous())
    byte = torch.arange(128, dtype=torch.uint8).reshape(128, 1)
    got, exact = (
        decode_fp4(packed, swizzled(byte), (128, 16), 16, to) for to in (dtype, torch.float32)
    )
    assert torch.equal(got[:127].double(), exact[:127].double())
    want = byte[:127].view(E4M3).double() * torch.tensor(MAGNITUDES).double()
    assert torch.equal(exact[:127, :8].double(), want)
    assert torch.isnan(got[127]).all()


def test_every_power_of_two_is_exact_in_bfloat16():
    packed = packed_of(torch.arange(8, dtype=torch.uint8).repeat(4).expand(256, 32).contiguous())
    byte = torch.arange(256, dtype=torch.int64).reshape(256, 1)
    got = decode_fp4(packed, swizzled(byte.to(torch.uint8)), (256, 32), 32)[:, :8].double()
    want = 2.0 ** (byte.double() - 127) * torch.tensor(MAGNITUDES).double()
    # The last two go beyond bfloat16's range, times 4 and 6.
    assert torch.equal(got[:253], want[:253])
    assert torch.isinf(got[254, -1]) and torch.isnan(got[255]).all()


def test_e4m3_of_nvfp4_errs_as_three_bits_do_and_heavy_codes_are_exact():
    """1.3 to 1.4% for absmax scales, where the scale of a power of two gives 2.1 to 2.3%.

    Of scales that are chosen by their error some have 4 for their largest code, which is rounded.
    """
    weight, packed, scale, tensor_scale = weight_of(256, 1024)
    stored, rows = decode_fp4_e4m3(packed, scale, tensor_scale, (256, 1024), 16)
    got, want = stored.double() * rows, weight.dequantize().double()
    assert 0.012 <= error(got, want) <= 0.018
    layout = formats.get("nvfp4").layout.kitchen_layout
    absmax = QuantizedTensor.from_float(make(256, 1024) * 0.02, layout)
    of_absmax = (absmax._qdata, absmax._params.block_scale, absmax._params.scale)
    stored_too, rows_too = decode_fp4_e4m3(*of_absmax, (256, 1024), 16)
    values = stored_too.double() * rows_too
    assert 0.012 <= error(values, absmax.dequantize().double()) <= 0.015
    codes = reference.codes(packed).abs()
    heavy = (codes == 1.5) | (codes == 3) | (codes == 6)
    torch.testing.assert_close(got[heavy], want[heavy], rtol=1e-6, atol=0)
    mantissa, _ = torch.frexp(rows / tensor_scale)
    # 1.5 · 2^k, up to the rounding of the product with the tensor's scale.
    torch.testing.assert_close(mantissa, torch.full_like(mantissa, 0.75))


def test_e4m3_scale_is_the_least_with_which_nothing_exceeds_448():
    packed = torch.full((127, 8), 0x77, dtype=torch.uint8)
    byte = torch.arange(127, dtype=torch.uint8).reshape(127, 1)
    stored, rows = decode_fp4_e4m3(packed, swizzled(byte), None, (127, 16), 16)
    want = (6 * byte.view(E4M3).double()).expand(127, 16)
    torch.testing.assert_close(stored.double() * rows, want, rtol=1e-6, atol=0)
    assert stored.float().max() <= 448
    # But for the scale 0, which is taken for the least other.
    assert (2 * stored[1:].float() > 448).all()


@pytest.mark.parametrize("least", [-14, -15])
def test_e4m3_of_mxfp4_is_exact_within_14_powers_of_two(least):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (40, 512), generator=generator, dtype=torch.uint8)
    powers = torch.randint(least, 1, (40, 16), generator=generator)
    powers[:, 3], powers[:, 5] = 0, least
    scale = swizzled((powers + 120).to(torch.uint8))
    packed = packed_of(codes)
    exact = decode_fp4(packed, scale, (40, 512), 32, torch.float32)
    stored, rows = decode_fp4_e4m3(packed, scale, None, (40, 512), 32)
    same = torch.equal(stored.float() * rows, exact)
    assert same == (least == -14)
    assert torch.equal(torch.frexp(rows).mantissa, torch.full_like(rows, 0.5))


def test_rows_of_zeros_and_of_nan():
    packed = torch.full((3, 32), 0x21, dtype=torch.uint8)
    byte = torch.full((3, 4), 0x38, dtype=torch.uint8)
    byte[0] = 0
    byte[1, 2] = 0x7F
    stored, rows = decode_fp4_e4m3(packed, swizzled(byte), torch.tensor(2.0), (3, 64), 16)
    assert not stored[0].float().any() and rows[0] > 0
    assert torch.isnan(stored[1, 32:48].float()).all() and torch.isfinite(rows[1])
    assert torch.isfinite(stored[2].float()).all()


def test_operation_is_known_to_the_compiler():
    _, packed, scale, tensor_scale = weight_of(33, 250)
    meta = [t.to("meta") for t in (packed, scale, tensor_scale)]
    stored, rows = decode_fp4_e4m3(*meta, (33, 250), 16)
    want = decode_fp4_e4m3(packed, scale, tensor_scale, (33, 250), 16)
    assert (stored.shape, stored.dtype) == (want[0].shape, want[0].dtype)
    assert (rows.shape, rows.dtype) == (want[1].shape, want[1].dtype)
    got = decode_fp4(meta[0], meta[1], (33, 250), 16)
    assert (got.shape, got.dtype) == ((33, 256), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 8}, "group is 8; 16"),
        ({"shape": (65, 64)}, r"packed holds \[64, 64\]; at least \[65, 64\]"),
        ({"scale": torch.zeros(511, dtype=torch.uint8)}, "511 elements; 512 of one byte"),
        ({"scale": torch.zeros(512)}, "scale is torch.float32"),
        (
            {"scale": torch.zeros(512, dtype=torch.uint8, device="meta")},
            "scale is on meta, the weight on cpu",
        ),
        ({"packed": torch.zeros(64, 32)}, "contiguous uint8"),
        ({"dtype": torch.int8}, "to torch.int8"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    _, packed, scale, _ = weight_of(64, 64)
    given = {"packed": packed, "scale": scale, "shape": (64, 64), "group": 16, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        decode_fp4(**given)
