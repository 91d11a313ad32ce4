"""The kernels of 4-bit weights compiled for every architecture: instructions and spills."""

import re

import pytest

triton = pytest.importorskip("triton", reason="Triton, which compiles the kernels, is missing")
tl = pytest.importorskip("triton.language")

from lowbit.ops.decode_fp4 import triton as decoding  # noqa: E402
from lowbit.ops.decode_fp4.kernel import decode_fp4_kernel  # noqa: E402
from lowbit.ops.fp4_mm.choice import FEW, MANY, Tile, few_tile  # noqa: E402
from lowbit.ops.fp4_mm.kernel import add_splits_kernel, fp4_mm_kernel  # noqa: E402
from lowbit.ops.fp4_mm.triton import SUM_BLOCK  # noqa: E402
from lowbit.ops.mxfp4_mm import triton as native  # noqa: E402
from lowbit.ops.mxfp4_mm.kernel import mxfp4_mm_kernel, quantize_mxfp4_kernel  # noqa: E402
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


BLOCK_SCALED = {
    100: r"tcgen05\.mma\.cta_group::1\.kind::mxf4\.block_scale\.scale_vec::2X",
    120: r"mma\.sync\.\S*kind::mxf4nvf4\.block_scale\.scale_vec::2X\S*ue8m0",
}


@pytest.mark.parametrize("arch", BLOCK_SCALED)
def test_product_of_two_mxfp4_is_block_scaled_instructions(arch, tmp_path):
    types = dict.fromkeys(("x", "x_scale", "packed"), "*u8")
    types |= {"scale": "*i32", "bias": "*bf16", "out": "*bf16", "zero": "fp32"}
    types |= dict.fromkeys(("M", "N", "K", "columns", "words"), "i32")
    constants = {
        **{"BLOCK_M": native.BLOCK_M, "BLOCK_N": native.BLOCK_N, "BLOCK_K": native.BLOCK_K},
        "GROUP_M": native.GROUP_M,
    }
    options = {"num_warps": native.WARPS, "num_stages": native.STAGES}
    kernel = compiled(mxfp4_mm_kernel, types, constants, arch, **options)
    ptx = kernel.asm["ptx"]
    assert re.search(BLOCK_SCALED[arch], ptx) and not re.search(r"mma\S*(bf16|kind::f16)", ptx)
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
    assert kernel.metadata.shared <= SHARED_KIB[arch] * 1024


@pytest.mark.parametrize("arch", [80, *BLOCK_SCALED])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activation_is_rounded_to_mxfp4_without_local_memory(arch, dtype, tmp_path):
    types = {"x": f"*{dtype}", "packed": "*u8", "scale": "*u8"}
    types |= dict.fromkeys(("M", "K", "columns", "stride_x"), "i32")
    constants = {"ROWS": native.ROWS, "COLUMNS": native.COLUMNS}
    kernel = compiled(
        quantize_mxfp4_kernel, types, constants, arch, num_warps=native.QUANTIZER_WARPS
    )
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES


@triton.jit
def scaled_tile(a, a_scale, b, b_scale, out, zero, steps, A: tl.constexpr, B: tl.constexpr):
    """out [128, 128] = a · bᵀ, of formats A and B, 128 columns a step.

    In a loop, and each with scales of its own: Triton 3.6 fails for SM100 without.
    """
    row = tl.arange(0, 128)
    wide_a = tl.arange(0, 64 if A == "e2m1" else 128)
    wide_b = tl.arange(0, 64 if B == "e2m1" else 128)
    at_scale = row[:, None] * 4 + tl.arange(0, 4)[None, :]
    acc = tl.full((128, 128), zero, tl.float32)
    for step in range(steps):
        left = tl.load(a + step * 16384 + row[:, None] * 128 + wide_a[None, :])
        right = tl.load(b + step * 16384 + row[:, None] * 128 + wide_b[None, :])
        left_scale = tl.load(a_scale + step * 512 + at_scale)
        right_scale = tl.load(b_scale + step * 512 + at_scale)
        acc = tl.dot_scaled(left, left_scale, A, right.T, right_scale, B, acc=acc)
    tl.store(out + row[:, None] * 128 + row[None, :], acc)


@pytest.mark.parametrize(
    ("a", "b", "arch", "native_there"),
    [
        *(("e2m1", "e2m1", arch, arch >= 100) for arch in (90, 100, 120)),
        *(("e4m3", "e4m3", arch, arch >= 100) for arch in (90, 100, 120)),
        *(("e4m3", "e2m1", arch, arch == 100) for arch in (90, 100, 120)),
    ],
)
def test_where_triton_emulates_block_scales(a, b, arch, native_there):
    """As docs/results/triton.md has it: there the factors are decoded and multiplied in bf16."""
    types = {"e2m1": "*u8", "e4m3": "*fp8e4nv"}
    signature = {"a": types[a], "b": types[b], "out": "*fp32", "zero": "fp32", "steps": "i32"}
    signature |= dict.fromkeys(("a_scale", "b_scale"), "*u8")
    ptx = compiled(scaled_tile, signature, {"A": a, "B": b}, arch).asm["ptx"]
    assert bool(re.search(r"mma\S*block_scale", ptx)) == native_there
    assert bool(re.search(r"mma\S*bf16", ptx)) != native_there


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
        **{"RANK": 0, "PIECE": 0},
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel = compiled(scaled_mm_kernel, types, constants, arch, **options)
    wanted = {90: r"wgmma.*m64n128k16", 100: "tcgen05.mma", 120: "mma.sync.*m16n8k16"}[arch]
    assert re.search(wanted, kernel.asm["ptx"])
    if arch == HOPPER:
        assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
    assert kernel.metadata.shared <= SHARED_KIB[arch] * 1024
