"""The kernels of 4-bit weights compiled for every architecture: instructions and spills."""

import re

import pytest

triton = pytest.importorskip("triton", reason="Triton, which compiles the kernels, is missing")

from lowbit.ops.decode_fp4 import triton as decoding  # noqa: E402
from lowbit.ops.decode_fp4.kernel import decode_fp4_kernel  # noqa: E402
from lowbit.ops.fp4_mm.kernel import add_splits_kernel, fp4_mm_kernel  # noqa: E402
from lowbit.ops.fp4_mm.triton import FEW, MANY, SUM_BLOCK, Tile, few_tile  # noqa: E402
from lowbit.ops.scaled_mm.kernel import scaled_mm_kernel  # noqa: E402
from tests.ops.test_aot import (  # noqa: E402
    ARCHITECTURES,
    FIRST_WITH_FP8,
    HOPPER,
    SHARED_KIB,
    SPILLED_BYTES,
    compiled,
    spilled_bytes,
)

GROUPS = (16, 32)
# A 16-bit E2M1 from its nibble, by one instruction for two: FP16 or BF16, times a power of two.
UNITS = {"bf16": "fma.rn.bf16x2", "fp16": "fma.rn.f16x2", "fp32": "fma.rn.f16x2"}


def decoder(arch: int, to: str, group: int, columns: int = 5120, padded: bool = False):
    types = {"packed": "*u8", "scale": "*i32", "stored": f"*{to}"}
    types |= dict.fromkeys(("N", "K", "columns", "words"), "i32")
    e4m3 = to == "fp8e4nv"
    rows = {"tensor_scale": "*fp32", "row_scale": "*fp32"}
    constants = {} if e4m3 else dict.fromkeys(rows)
    constants |= {
        **{"GROUP": group, "ROWS": decoding.ROWS, "COLUMNS": decoding.COLUMNS},
        **{"ROW_WORDS": columns // group // 4 if e4m3 else None, "RAGGED": padded},
        **{"PADDED": padded, "PDL": arch >= HOPPER},
    }
    options = {"num_warps": decoding.WARPS, "enable_fp_fusion": False}
    return compiled(decode_fp4_kernel, types | (rows if e4m3 else {}), constants, arch, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("to", "group"), [("bf16", 16), ("fp16", 32)])
def test_decoder_to_16_bits_is_integer_instructions_and_wide_accesses(arch, group, to, tmp_path):
    kernel = decoder(arch, to, group)
    ptx = kernel.asm["ptx"]
    assert UNITS[to] in ptx and "e4m3" not in ptx and "e2m1" not in ptx
    assert re.search(r"ld\.global.*v[24]\.b32", ptx) and re.search(r"st\.global.*v4\.b32", ptx)
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
    assert kernel.metadata.shared <= SHARED_KIB[arch] * 1024


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch >= FIRST_WITH_FP8])
@pytest.mark.parametrize("group", GROUPS)
def test_decoder_to_e4m3_looks_codes_up(arch, group, tmp_path):
    kernel = decoder(arch, "fp8e4nv", group, 13824, padded=arch == HOPPER)
    ptx = kernel.asm["ptx"]
    elements = decoding.ROWS * decoding.COLUMNS // (decoding.WARPS * 32)
    # An instruction for the codes of four, one for their signs.
    assert len(re.findall(r"prmt\.b32\s+x, ", ptx)) >= elements // 4
    assert ptx.count("and.b32 n, ") == elements // 8
    assert re.search(r"ld\.global.*v[24]\.b32", ptx) and re.search(r"st\.global.*v4\.b32", ptx)
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES


def few(tile: Tile, arch: int, dtype: str, group: int, ragged: bool = False):
    types = {"x": f"*{dtype}", "packed": "*u8", "scale": "*i32"}
    split = tile.splits > 1
    given = {} if split else {"tensor_scale": "*fp32", "bias": f"*{dtype}"}
    types |= {**given, "out": "*fp32" if split else f"*{dtype}"}
    types |= dict.fromkeys(("M", "N", "K", "columns", "words", "stride_x"), "i32")
    constants = {
        **(dict.fromkeys(("tensor_scale", "bias")) if split else {}),
        **{"GROUP": group, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        **{"BLOCK_K": tile.block_k, "SPLITS": tile.splits, "RAGGED": ragged, "PDL": arch >= HOPPER},
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return compiled(fp4_mm_kernel, types, constants, arch, **options)


@pytest.mark.parametrize(
    ("arch", "tokens"),
    [*((arch, max(FEW)) for arch in ARCHITECTURES), (80, min(FEW)), *((90, t) for t in FEW)],
)
@pytest.mark.parametrize(("dtype", "group"), [("bf16", 16), ("fp16", 32)])
def test_product_of_few_tokens_decodes_in_registers(arch, tokens, dtype, group, tmp_path):
    tile = few_tile(tokens, group)
    kernel = few(tile, arch, dtype, group, ragged=arch in (80, 120))
    ptx = kernel.asm["ptx"]
    assert UNITS[dtype] in ptx and "e4m3" not in ptx
    assert re.search(r"mma.sync.*m16n8k16|wgmma.mma_async|tcgen05.mma", ptx)
    assert "cp.async" in ptx
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
    assert kernel.metadata.shared <= SHARED_KIB[arch] * 1024


@pytest.mark.parametrize("arch", [80, 90])
def test_splits_are_added_up_without_atomics(arch):
    types = {"sums": "*fp32", "tensor_scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
    types |= {"size": "i32", "N": "i32"}
    constants = {"SPLITS": 8, "BLOCK": SUM_BLOCK, "PDL": arch >= HOPPER}
    ptx = compiled(add_splits_kernel, types, constants, arch).asm["ptx"]
    assert "atom" not in ptx and "red." not in ptx


@pytest.mark.parametrize("arch", [90, 100, 120])
@pytest.mark.parametrize("tokens", MANY)
def test_product_of_a_decoded_weight_fits_and_uses_the_tensor_cores(arch, tokens, tmp_path):
    tile, dtype = MANY[tokens], "bf16"
    sizes = ("M", "N", "K", "stride_a", "stride_b")
    types = {
        "a": f"tensordesc<{dtype}[{tile.block_m}, {tile.block_k}]>",
        "b": f"tensordesc<{dtype}[{tile.block_n}, {tile.block_k}]>",
        **{"c": f"*{dtype}", "scale_a": "*fp32", "scale_b": "*fp32", "bias": f"*{dtype}"},
        **dict.fromkeys(sizes, "i32"),
    }
    optional = ("zero_point", "column_sum", "gate", "residual", "gate_tokens", "step_scale_a")
    constants = {
        **dict.fromkeys((*optional, "stride_scale_a", "stride_gate", "stride_residual")),
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        **{"GROUP_M": tile.group_m, "USE_TMA": True, "INTEGER": False, "FLATTEN": tile.flatten},
        **{"SCALE_A": "one", "SCALE_B": "one", "HAS_BIAS": True, "HAS_ZERO_POINT": False},
        **{"ACTIVATION": None, "GATE_ROWS": None, "HAS_RESIDUAL": False, "PARTS": 1, "PDL": True},
        **{"RANK": 0, "PIECE": 0, "MORE_STEPS": 0},
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel = compiled(scaled_mm_kernel, types, constants, arch, **options)
    wanted = {90: r"wgmma.*m64n128k16", 100: "tcgen05.mma", 120: "mma.sync.*m16n8k16"}[arch]
    assert re.search(wanted, kernel.asm["ptx"])
    if arch == HOPPER:
        assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
    assert kernel.metadata.shared <= SHARED_KIB[arch] * 1024
