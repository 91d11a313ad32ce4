"""The CUDA C++ of `fp4_scaled_mm`: compiled where NVRTC is, and its decoder in a model of it."""

import itertools
import re

import pytest
import torch

from lowbit.ops.decode_fp4 import reference
from lowbit.ops.fp4_scaled_mm import hopper
from lowbit.ops.fp4_scaled_mm.tiles import TILES, Tile
from lowbit.ops.quantize_rows import interleave

from ..cuda.compiled import compiled, disassembled, fields_of

E4M3 = torch.float8_e4m3fn
SHARED_KIB = 228
OTHERS = ((16, torch.float16), (16, torch.float32), (32, torch.bfloat16))
# Those that take the most registers, of each number of warpgroups, and a small one.
LARGEST = (Tile(1, 256), Tile(2, 256), Tile(3, 192))
SOME = (*LARGEST, Tile(2, 64))
SHARED_BY_TWO = (Tile(1, 256, 2), Tile(2, 256, 2), Tile(3, 192, 2), Tile(1, 64, 2))
IN_TURN = tuple(Tile(1, tokens, turns=2) for tokens in (64, 192, 256))


@pytest.mark.parametrize(
    ("tile", "group", "dtype"),
    [
        *((tile, 16, torch.bfloat16) for tile in (*SOME, *SHARED_BY_TWO, *IN_TURN)),
        *((LARGEST[1], *other) for other in OTHERS),
        *((SHARED_BY_TWO[1], *other) for other in OTHERS),
    ],
    ids=str,
)
def test_kernel_uses_wgmma_and_no_local_memory(tile, group, dtype, tmp_path):
    code = compiled(hopper.source(tile), hopper.options(tile, group, dtype))
    sass, usage = disassembled(code, tmp_path)
    assert re.search(r"STACK:0\b.*LOCAL:0\b", usage)
    # This grid may be set up while the kernel before it ends: no memory is touched before the wait,
    # which only a fetch into the L2 cache comes before.
    memory = re.search(r"\b(LDG|LDGSTS|STG|UTMALDG|UBLKCP)\b", sass)
    assert memory.start() > sass.index("ACQBULK") > sass.index("CCTL.E.PF2")
    # Four products of 32 columns; the tensor cores work on one half while the other is decoded.
    assert len(re.findall(rf"\bQGMMA\.64x{tile.tokens}x32", sass)) == 4
    assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1\b", sass)) == 2
    # Half of the sums go to the other block of the cluster, sixteen bytes at a time.
    sent = len(re.findall(r"\bSTAS\S*\.128 ", sass))
    assert sent == (tile.tokens // 16 if tile.parts == 2 else 0)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_shared_memory_and_registers_suffice(tile):
    used = tile.shared_bytes + hopper.ALIGNMENT + 4 * (tile.tokens + tile.rows)
    # A KiB is the system's.
    assert used + 8 * (2 * tile.stages + 1) + 1024 <= SHARED_KIB * 1024
    # The result goes by way of the stages.
    assert tile.stages >= max(tile.groups, 2)


@pytest.mark.parametrize("tile", [tile for tile in TILES if tile.turns == 2], ids=str)
def test_a_place_in_the_ring_is_always_one_warpgroups(tile):
    """Else one would take the phase before a place's first fill for that after its second."""
    assert tile.stages % tile.turns == 0
    assert tile.stages >= 2 * tile.turns


def test_parameters_are_laid_out_as_in_the_source():
    """Names and order of `struct Params`, with those of `struct Numbers` in it."""
    text = hopper.source(TILES[0])
    fields = fields_of(text, "Params")
    assert fields.pop() == "Numbers numbers"
    fields += fields_of(text, "Numbers")
    assert fields == [name for name, _ in hopper.Params._fields_]


def prmt(low: torch.Tensor, high: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """PTX's prmt.b32: four bytes of eight by three bits, or by a fourth bit their signs alone."""
    out = torch.zeros_like(selector)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        word = torch.where(nibble & 4 > 0, high, low)
        byte = word >> 8 * (nibble & 3) & 0xFF
        byte = torch.where(nibble & 8 > 0, (byte >> 7) * 0xFF, byte)
        out |= byte << 8 * i
    return out


def table_of(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = (factor[:, None] * magnitudes).to(E4M3).view(torch.uint8).long()
    words = (codes.reshape(-1, 2, 4) << torch.tensor([0, 8, 16, 24])).sum(2)
    return words[:, 0], words[:, 1]


def look_up(codes: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    magnitudes = prmt(low, high, codes & 0x7777)
    constant = torch.full_like(codes, 0x40404040)
    return 2 * prmt(constant, constant, codes) + magnitudes


@pytest.mark.parametrize("group", [16, 32])
def test_table_gives_the_reference_of_all_codes_and_scales_negated(group):
    """All 256 bytes by all scales that are numbers, below every largest scale that is apart."""
    scales = torch.arange(127 if group == 16 else 255, dtype=torch.uint8)
    packed = torch.arange(256, dtype=torch.uint8)
    for largest in scales[:: 8 if group == 16 else 25].tolist():
        some = scales[: largest + 1]
        values = reference.values(some, group)
        row = reference.row_scale(values[-1:, None], group)
        factor = values * (1.0 / row[0])
        want = reference.codes(packed[None])[0] * factor[:, None]
        want = want.to(E4M3).view(torch.uint8).reshape(-1, 256, 2)
        low, high = table_of(factor)
        pairs = packed.long() | packed.long() << 8
        got = look_up(pairs[None].expand(len(some), -1), low[:, None], high[:, None])
        # The lower byte of two is looked up first, and of a byte the odd column.
        odd, even = got & 0xFF, got >> 8 & 0xFF
        assert torch.equal(odd ^ 0x80, want[..., 1].long())
        assert torch.equal(even ^ 0x80, want[..., 0].long())


def test_threads_hold_the_columns_that_the_order_gives_their_products():
    """A row of 128 columns, from packed bytes to the operands, as decode.cu describes it."""
    codes = torch.randint(0, 16, (128,), generator=torch.Generator().manual_seed(0))
    packed = codes[0::2] << 4 | codes[1::2]
    operands = torch.full((4, 32), -1)
    for t, j, h in itertools.product(range(4), range(4), range(2)):
        # Lane t has sixteen bytes; its word j; the half of that.
        two = packed[16 * t + 4 * j + 2 * h :][:2]
        for place in range(4):
            operands[j, 16 * h + 4 * t + place] = two[place // 2] >> 4 * (place % 2) & 15
    assert torch.equal(operands.reshape(1, 128), interleave(codes[None]))


def test_tile_of_another_size_is_a_source_of_its_own():
    assert "m64n96k32" in hopper.instruction(96) and "%47" in hopper.instruction(96)
    assert hopper.source(Tile(1, 96)) != hopper.source(Tile(1, 64))
