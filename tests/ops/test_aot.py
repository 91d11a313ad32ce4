"""Every Triton kernel compiled for every architecture, on the CPU: instructions and spills."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton, which compiles the kernels, is missing")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lowbit.ops.quantize_rows import LIMITS  # noqa: E402
from lowbit.ops.quantize_rows.kernel import quantize_rows_kernel  # noqa: E402
from lowbit.ops.quantize_rows.triton import K_MAX, cover, warps_of  # noqa: E402
from lowbit.ops.scaled_mm.kernel import scaled_mm_kernel  # noqa: E402
from lowbit.ops.scaled_mm.tiles import TABLE, Tile  # noqa: E402
from lowbit.ops.scaled_mm.triton import BLOCK_TABLE, parts, pieces  # noqa: E402
from tests.ops.triton_versions import VERSIONS, Version  # noqa: E402

WARP_SIZE = 32
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Shared memory of one program at most, in KiB, by architecture.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
FIRST_WITH_FP8 = 89
HOPPER = 90
TYPES = {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5"}
ALIGNED = [["tt.divisibility", 16]]
# Of a version that is not known nothing is excused.
SPILLED_BYTES = VERSIONS.get(triton.__version__, Version(())).spilled_bytes
EVERY_TRITON = pytest.mark.every_triton
TOOLS = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"


def compiled(kernel, types: dict[str, str], constants: dict, arch: int, **options):
    """The kernel compiled for pointers and sizes that are multiples of 16."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {
        (index,): ALIGNED
        for index, name in enumerate(names)
        if signature[name] == "i32" or signature[name].startswith("*")
    }
    if "M" in names:
        del attributes[(names.index("M"),)]
    source = ASTSource(kernel, signature, constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP_SIZE), options=options)


def spilled_bytes(kernel, tmp_path: Path) -> int:
    """Bytes of local memory a thread, as cuobjdump reports them: what registers do not hold."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    done = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", cubin],
        capture_output=True,
        text=True,
        check=True,
    )
    stack, local = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", done.stdout).groups()
    return int(stack) + int(local)


def product(tile: Tile, arch: int, a: torch.dtype, b: torch.dtype, scales="row", **given):
    """The product's kernel; given: types of the optional pointers, and constants that differ."""
    pointers = {"a": f"*{TYPES[a]}", "b": f"*{TYPES[b]}"}
    if tile.tma:
        pointers = {
            "a": f"tensordesc<{TYPES[a]}[{tile.block_m}, {tile.block_k}]>",
            "b": f"tensordesc<{TYPES[b]}[{tile.block_n}, {tile.block_k}]>",
        }
    optional = ("bias", "zero_point", "column_sum", "gate", "residual", "h", "u")
    types = {
        **pointers,
        **{"c": "*bf16", "scale_a": "*fp32", "scale_b": "*fp32"},
        **{name: given[name] for name in optional if name in given},
        **{name: "i32" for name in ("M", "N", "K", "stride_a", "stride_b")},
    }
    sizes = {
        **{"stride_scale_a": scales == "block", "step_scale_a": scales == "block"},
        **{"gate_tokens": "gate" in given, "stride_gate": "gate" in given},
        **{"stride_residual": "residual" in given},
        **{name: "h" in given for name in ("stride_h", "stride_u")},
    }
    types.update({name: "i32" for name, there in sizes.items() if there})
    rank = given.get("RANK", 0)
    piece, flatten = pieces(tile, a == torch.int8, tile.tma, rank)
    activation, gate_rows = given.get("ACTIVATION"), given.get("GATE_ROWS")
    constants = {
        **{name: None for name in (*optional, *sizes) if name not in types},
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        **{"GROUP_M": tile.group_m, "USE_TMA": tile.tma, "FLATTEN": flatten},
        **{"INTEGER": a == torch.int8, "SCALE_A": scales, "SCALE_B": scales},
        **{"HAS_BIAS": "bias" in given, "HAS_ZERO_POINT": "zero_point" in given},
        **{"ACTIVATION": activation, "GATE_ROWS": gate_rows},
        "HAS_RESIDUAL": "residual" in given,
        "PARTS": parts(tile, activation, gate_rows, "residual" in given),
        **{"RANK": rank, "PIECE": piece},
        "PDL": arch >= HOPPER,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return compiled(scaled_mm_kernel, types, constants, arch, **options)


def instruction(tile: Tile, arch: int, integer: bool) -> str:
    """The tensor-core instruction that the tile should use, as a pattern."""
    if arch == HOPPER and tile.block_m >= 64:
        kind = "s32.s8.s8" if integer else "f32.e4m3.e4m3"
        return rf"wgmma.mma_async.sync.aligned.m64n\d+k32.{kind}"
    if arch == 100 and not integer and tile.block_m >= 64:
        return r"tcgen05.mma.*kind::f8f6f4"
    if arch in (HOPPER, 100) and not integer:
        # Triton turns FP8 to FP16 here; so few rows wait for the weight in any case.
        return r"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    kind = "s32.s8.s8.s32" if integer else "f32.e4m3.e4m3.f32"
    older = rf"mma.sync.aligned.m16n8k32.row.col.*{kind}"
    # Triton 3.9 has the tensor cores' own there.
    return rf"{older}|tcgen05.mma.*kind::i8" if arch == 100 else older


def tiles(table: dict, arch: int, integer: bool) -> list[Tile]:
    """Tiles of the table for an architecture, that differ in more than what no register sees."""
    least = max(known for known in table if known[0] * 10 + known[1] <= arch)
    rows = [row for row in table[least] if row.integer in (integer, None)]
    found = {
        (t.block_m, t.block_n, t.block_k, t.warps, t.stages, t.flatten, t.tma): t
        for row in rows
        for t in row.tiles
    }
    return list(found.values())


# What follows the sums: types of what is given, and constants.
PLAIN = {"bias": "*bf16"}
GELU = {"bias": "*bf16", "ACTIVATION": "gelu_tanh"}
GATED = {"bias": "*bf16", "gate": "*fp32", "GATE_ROWS": "one", "residual": "*bf16"}
ALL = {**GELU, "gate": "*fp32", "GATE_ROWS": "many", "residual": "*fp32"}
POINT = {"zero_point": "*i32", "column_sum": "*i32"}
# As LoRAs have it.
LOW_RANK = {"bias": "*bf16", "h": "*bf16", "u": "*bf16", "RANK": 64}


def cases() -> list:
    """(tile, architecture, dtype, scales, what follows): every tile, then the largest with more.

    The largest has the fewest registers to spare.
    """
    found = []
    for arch in ARCHITECTURES:
        for dtype in (torch.int8, torch.float8_e4m3fn):
            integer = dtype == torch.int8
            if not integer and arch < FIRST_WITH_FP8:
                continue
            by_row, by_block = (tiles(table, arch, integer) for table in (TABLE, BLOCK_TABLE))
            every = {**ALL, **POINT} if integer else ALL
            todo = [(tile, "row", "plain", PLAIN) for tile in by_row]
            todo += [(by_row[-1], "row", "all", every), (by_block[-1], "block", "all", ALL)]
            # The most that the kernel can do, once by rows and once by blocks.
            for_every_triton = ("row" if integer else "block", "all")
            todo += [(by_row[-1], "row", "low rank", LOW_RANK)]
            if arch == HOPPER:
                todo += [(tile, "row", "low rank", LOW_RANK) for tile in by_row[:-1]]
                todo += [(tile, "block", "plain", PLAIN) for tile in by_block]
                todo += [(by_row[-1], "row", "gelu", GELU), (by_row[-1], "row", "gated", GATED)]
            found += [
                pytest.param(
                    *(tile, arch, dtype, scales, given),
                    id=f"{arch}-{dtype}-{scales}-{what}",
                    marks=EVERY_TRITON if (scales, what) == for_every_triton else (),
                )
                for tile, scales, what, given in todo
            ]
    return found


@pytest.mark.parametrize(("tile", "arch", "dtype", "scales", "given"), cases())
def test_product_uses_the_tensor_cores_and_no_local_memory(
    tile, arch, dtype, scales, given, tmp_path
):
    kernel = product(tile, arch, dtype, dtype, scales, **given)
    assert re.search(instruction(tile, arch, dtype == torch.int8), kernel.asm["ptx"])
    assert kernel.metadata.shared <= SHARED_KIB[arch] * 1024
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES


def test_e4m3_times_e5m2_is_one_instruction_on_hopper():
    tile = TABLE[9, 0][-1].tiles[0]
    ptx = product(tile, HOPPER, torch.float8_e4m3fn, torch.float8_e5m2, **PLAIN).asm["ptx"]
    assert re.search(r"wgmma.*f32.e4m3.e5m2", ptx)


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a >= HOPPER])
@pytest.mark.parametrize("which", [0, -1])
def test_early_start_touches_no_memory_before_the_wait(arch, which):
    tile = tiles(TABLE, arch, True)[which]
    ptx = product(tile, arch, torch.int8, torch.int8, **PLAIN).asm["ptx"]
    memory = re.compile(r"\b(ld|st|red|atom)\.[\w.:]*global|\bcp\.async|\bst\.global")
    wait = ptx.index("griddepcontrol.wait")
    assert memory.search(ptx).start() > wait
    assert "griddepcontrol.launch_dependents" not in ptx


def quantizer(
    k: int,
    arch: int,
    dtype: torch.dtype,
    rotate: bool,
    prologue: str = "",
    interleave: bool = False,
):
    """The kernel of a row of k bf16 values; prologue: "layer" with modulation, "gelu" or none."""
    modulation = {"scale": "*bf16", "shift": "*bf16"} if prologue == "layer" else {}
    sizes = ("K", "stride_x", "stride_scale", "stride_shift", "tokens_scale", "tokens_shift")
    types = {
        **{"x": "*bf16", "stored": f"*{TYPES[dtype]}", "row_scale": "*fp32", "eps": "fp32"},
        **dict.fromkeys(sizes, "i32"),
        **modulation,
    }
    starts, groups, exact = cover(k)
    constants = {
        **{name: None for name in ("input_scale", "weight", "bias")},
        **{name: None for name in ("scale", "shift") if name not in modulation},
        **{"LIMIT": LIMITS[dtype], "STARTS": starts, "GROUPS": groups, "EXACT": exact},
        **{"ROTATE": rotate, "PREPARE": prologue != "", "GELU": prologue == "gelu"},
        **{"NORM": "layer" if prologue == "layer" else "", "INTERLEAVE": interleave},
    }
    warps = warps_of(divmod(arch, 10), k, rotate, prologue != "")
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return compiled(quantize_rows_kernel, types, constants, arch, **options)


def quantizers() -> list:
    """(architecture, rotate, prologue): all on Hopper; elsewhere, where warps are alike, the most.

    There, a row with a prologue and one without are seen on the first architecture.
    """
    found = []
    for arch in ARCHITECTURES:
        found += [pytest.param(arch, True, "layer", marks=EVERY_TRITON), (arch, False, "gelu")]
        found += [(arch, True, "gelu"), (arch, False, "")] if arch in (80, HOPPER) else []
        found += [(arch, True, ""), (arch, False, "layer")] if arch == HOPPER else []
    return found


@pytest.mark.parametrize(("arch", "rotate", "prologue"), quantizers())
def test_quantizer_uses_the_tensor_cores_to_rotate_and_no_local_memory(
    arch, rotate, prologue, tmp_path
):
    kernel = quantizer(5120, arch, torch.int8, rotate, prologue)
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
    assert ("mma" in kernel.asm["ptx"]) == rotate


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch >= FIRST_WITH_FP8])
@pytest.mark.parametrize("rotate", [True, pytest.param(False, marks=EVERY_TRITON)])
def test_quantizer_to_fp8_compiles(arch, rotate, tmp_path):
    kernel = quantizer(3072, arch, torch.float8_e4m3fn, rotate)
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES


@pytest.mark.parametrize("k", [128, 3072, 5120, 13824])
@pytest.mark.parametrize("prologue", ["", "layer", "gelu"])
def test_interleaving_quantizer_stores_whole_words(k, prologue, tmp_path):
    kernel = quantizer(k, HOPPER, torch.float8_e4m3fn, False, prologue, True)
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
    stores = re.findall(r"st\.global\.(\S+)", kernel.asm["ptx"])
    # The scale is one word; codes go four and more at a time.
    assert stores and not {"b8", "b16"} & set(stores)


# Wide rows follow a GELU; norms come before narrower ones.
@pytest.mark.parametrize("k", [2048, 3072, 12288, 13824, 14336, K_MAX])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("prologue", ["", "gelu"])
def test_quantizer_keeps_rows_of_every_width_in_registers(k, rotate, prologue, tmp_path):
    kernel = quantizer(k, HOPPER, torch.int8, rotate, prologue)
    assert spilled_bytes(kernel, tmp_path) <= SPILLED_BYTES
