"""The kernels of 4-bit weights in Triton's interpreter; `test_interpreted.py` runs this file.

There, bytes are decoded by arithmetic: `test_aot_fp4.py` and the tests on a GPU see the PTX.
"""

import pytest
import torch

from lowbit.ops.decode_fp4 import reference as decode_reference
from lowbit.ops.decode_fp4 import triton as decode_triton
from lowbit.ops.fp4_mm import reference as mm_reference
from lowbit.ops.fp4_mm import triton as mm_triton
from lowbit.ops.mxfp4_mm import reference as mx_reference
from lowbit.ops.mxfp4_mm import triton as mx_triton

E4M3 = torch.float8_e4m3fn


def weight(n: int, k: int, group: int, seed: int = 0):
    """(packed [N, K' / 2], swizzled scales of ordinary size, tensor scale); padding is poisoned."""
    generator = torch.Generator().manual_seed(seed)
    columns = -(-k // group) * group
    packed = torch.randint(0, 256, (n, columns // 2), generator=generator, dtype=torch.uint8)
    wide = -(-(columns // group) // 4)
    low, high = (0x28, 0x70) if group == 16 else (117, 131)
    scale = torch.randint(low, high, (-(-n // 128) * wide * 512,), generator=generator)
    return packed, scale.to(torch.uint8), torch.tensor(0.37)


@pytest.mark.parametrize(
    ("group", "dtype", "short", "n", "k"),
    [
        *((16, d, s, 1, 64) for d, s in ((torch.float32, 0), (torch.float16, 5), (E4M3, 5))),
        *((32, d, s, 1, 64) for d, s in ((torch.bfloat16, 0), (torch.float16, 5), (E4M3, 5))),
        *((16, d, s, 130, 1088) for d, s in ((torch.float16, 5), (torch.bfloat16, 0), (E4M3, 5))),
        *((32, d, s, 130, 1088) for d, s in ((torch.float32, 0), (E4M3, 5))),
    ],
)
def test_decoded_weight_is_that_of_the_reference(group, dtype, short, n, k):
    """short: columns that are padding."""
    arguments = (*weight(n, k, group), n, k - short, group, dtype)
    got, rows = decode_triton.run(*arguments)
    want, want_rows = decode_reference.run(*arguments)
    assert (rows is None) == (want_rows is None) == (dtype != E4M3)
    assert rows is None or torch.equal(rows, want_rows)
    # In the interpreter an FP8 mantissa that rounds up does not carry into the exponent.
    near = torch.isclose(got.float(), want.float(), rtol=2**-3 if dtype == E4M3 else 0, atol=0)
    assert near.float().mean() > (0.95 if dtype == E4M3 else 0.9999999)
    assert not got[:, k - short :].float().any()


@pytest.mark.parametrize("group", [16, 32])
def test_every_scale_is_that_of_the_reference(group):
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)[:, :: 256 // group]
    packed = packed.repeat(1, 1)[:, : group // 2].contiguous()
    scale = torch.zeros(2, 32, 4, 4, dtype=torch.uint8)
    byte = torch.arange(256, dtype=torch.uint8)
    if group == 16:
        byte &= 0x7F
    scale[..., 0] = byte.reshape(2, 4, 32).transpose(1, 2)
    arguments = (packed, scale.reshape(-1), None, 256, group, group, torch.float32)
    got, want = decode_triton.run(*arguments)[0], decode_reference.run(*arguments)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    got, want = (run.run(*arguments[:-1], E4M3)[1] for run in (decode_triton, decode_reference))
    assert torch.equal(got, want)


def poisoned(scale: torch.Tensor, n: int, k: int, group: int) -> torch.Tensor:
    """Return swizzled scales with NaN wherever none is of a weight [n, k]."""
    columns = -(-scale.numel() // (-(-n // 128) * 128))
    places = torch.arange(scale.numel()).reshape(-1)
    real = decode_reference.unswizzle(places, n, columns)[:, : -(-k // group)]
    out = torch.full_like(scale, 0x7F if group == 16 else 0xFF)
    out[real] = scale[real]
    return out


@pytest.mark.parametrize(("group", "wide"), [(16, 64), (32, 0)])
def test_what_lies_in_the_padding_of_scales_shows_nowhere(group, wide):
    """wide: columns of padding beyond K's own, whose blocks of codes are garbage too."""
    n, k = 5, 200
    packed, scale, tensor_scale = weight(n, k + wide, group)
    bad = poisoned(scale, n, k, group)
    quiet = torch.where(bad == bad.max(), 0, bad)
    assert (bad != quiet).any() and (bad == scale).any()
    for dtype in (torch.float16, E4M3):
        given = (tensor_scale, n, k, group, dtype)
        clean, rows = decode_reference.run(packed, quiet, *given)
        for backend in (decode_triton, decode_reference):
            got, same = backend.run(packed, bad, *given)
            assert got.float().isfinite().all()
            assert rows is None or torch.equal(rows, same)
            # In the interpreter E4M3 is rounded otherwise.
            assert dtype == E4M3 or torch.equal(got, clean)
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(1)).half()
    for tile in TILES[1:]:
        clean, got = (
            mm_triton.run_tile(x, packed, s, tensor_scale * 1e-3, n, group, None, tile)
            for s in (quiet, bad)
        )
        assert torch.equal(got, clean)
        want = mm_reference.run(x, packed, bad, tensor_scale * 1e-3, None, n, group)
        torch.testing.assert_close(got, want, rtol=2**-9, atol=2**-9 * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(1, 32), (7, 1100), (5, 64)])
def test_activation_in_mxfp4_is_that_of_the_reference(m, k, dtype):
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 4, m)[:, None]
    x[0, :8] = torch.tensor([0.25, -0.75, 1.25, 1.75, 2.5, -3.5, 5.0, 6.0])
    x[-1, -32:] = 0
    x = x.to(dtype)
    columns = -(-k // 32) * 32
    (packed, scale), (wanted, scales) = (
        run.quantize(x, columns) for run in (mx_triton, mx_reference)
    )
    # Sums of squares in another order may decide otherwise between two that are nearly level.
    assert (scale == scales).float().mean() > 0.99
    same = (scale == scales).repeat_interleave(16, dim=1)
    assert torch.equal(packed[same], wanted[same])


def test_activation_that_is_not_finite_is_nan_in_its_block():
    x = torch.ones(4, 96)
    x[1, 40], x[2, 70], x[3, 5] = torch.nan, torch.inf, -torch.inf
    (_, scale), (_, scales) = (run.quantize(x, 96) for run in (mx_triton, mx_reference))
    assert torch.equal(scale, scales)
    assert (scale == 255).nonzero().tolist() == [[1, 1], [2, 2], [3, 0]]


TILES = [
    mm_triton.Tile(16, 16, 128, splits=1),
    mm_triton.Tile(16, 32, 256, splits=1),
    mm_triton.Tile(32, 16, 128, splits=3),
]


PRODUCTS = [(1, 48, 64, True), (37, 20, 448, False), (16, 130, 320, True)]


@pytest.mark.parametrize(
    ("tile", "product", "group"),
    [(t, p, (16, 32)[(t + p) % 2]) for t in range(len(TILES)) for p in range(len(PRODUCTS))],
)
def test_product_is_that_of_the_reference(tile, product, group):
    """Each tile with each product, and both groups with each of either."""
    tile, (m, n, k, biased) = TILES[tile], PRODUCTS[product]
    packed, scale, tensor_scale = weight(n, k, group)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator).half()
    bias = torch.randn(n, generator=generator) if biased else None
    given = tensor_scale * 1e-3 if biased else None
    got = mm_triton.run_tile(x, packed, scale, given, n, group, bias, tile)
    want = mm_reference.run(x, packed, scale, given, bias, n, group)
    # Sums of K terms in float32, some as large as the largest result.
    bound = 2**-10 * want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=2**-10, atol=bound)
