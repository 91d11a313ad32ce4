"""The Triton kernels of `attention` compiled for every architecture, on the CPU."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton, which compiles the kernels, is missing")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lowbit.ops.attention import prepare as prepare_module  # noqa: E402
from lowbit.ops.attention import prepass  # noqa: E402
from lowbit.ops.attention.kernels import prepare, prologue, values  # noqa: E402
from lowbit.ops.attention.kernels.attend import attend_kernel  # noqa: E402
from lowbit.ops.attention.modes import MODES  # noqa: E402
from lowbit.ops.attention.triton import ADDED_MASK, BOOL_MASK, NO_MASK, choose  # noqa: E402

WARP_SIZE = 32
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Shared memory of one program at most, in KiB, by architecture.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
HOPPER = 90
ALIGNED = [["tt.divisibility", 16]]
TOOLS = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv", None: "bf16"}
POINTERS = {
    **dict.fromkeys(("q", "k", "v", "x", "out"), "*bf16"),
    **dict.fromkeys(("q_scale", "k_scale", "v_scale", "v_offset", "v_sum", "lse"), "*fp32"),
    **dict.fromkeys(("partial", "k_mean", "v_mean", "scale", "bound", "shift", "sums"), "*fp32"),
    **dict.fromkeys(("means", "center"), "*fp32"),
    **{"factor": "fp32", "mask": "*i1", "eps": "fp32"},
    **{"inverse": "*fp32", "weight": "*bf16", "cos": "*fp32", "sin": "*fp32"},
}
# Lengths, and strides of one element: of no known divisor, or one.
ODD = ("ROWS", "KEYS", "LENGTH", "TILES", "BLOCKS", "CHUNKS", "PARTS", "H", "GROUP", "B", "first")
UNIT = ("v_d", "k_d", "q_d", "x_d", "out_d", "mask_k")


def compiled(kernel, constants: dict, arch: int, **options):
    """The kernel compiled for pointers and strides that are multiples of 16."""
    given = {name: 1 for name in UNIT if name in kernel.arg_names} | constants
    types = {**POINTERS, **options.pop("types", {})}
    signature = {
        name: "constexpr" if name in given else types.get(name, "i32") for name in kernel.arg_names
    }
    attributes = {
        (index,): ALIGNED
        for index, name in enumerate(kernel.arg_names)
        if signature[name] not in ("constexpr", "fp32") and name not in ODD
    }
    source = ASTSource(kernel, signature, given, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP_SIZE), options=options)


def spilled_bytes(kernel, tmp_path: Path) -> int:
    """Bytes of local memory a thread, as cuobjdump reports them."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin]
    done = subprocess.run(tool, capture_output=True, text=True, check=True)
    stack, local = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", done.stdout).groups()
    return int(stack) + int(local)


def attend(mode, arch: int, width: int, mask: int = NO_MASK, causal: bool = False):
    cut = choose((arch // 10, arch % 10), width, mode, mask != NO_MASK)
    storage = TYPES[mode.storage]
    constants = {
        **{"M": cut.m, "N": cut.n, "WIDTH": width, "PV": mode.code, "MASK": mask},
        **{"CAUSAL": causal, "HAS_LSE": True, "D": width},
    }
    types = {"q": "*i8", "k": "*i8", "v": f"*{storage}"}
    if mask == ADDED_MASK:
        types["mask"] = "*fp32"
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return compiled(attend_kernel, constants, arch, types=types, **options)


def cases() -> list:
    """Every mode where its instructions are; every head size on one architecture, the largest on
    one with little shared memory too.
    """
    return [
        pytest.param(mode, arch, width, id=f"{arch}-{mode.name}-{width}")
        for mode in MODES.values()
        for arch in ARCHITECTURES
        for width in (64, 128, 256)
        if mode.capability <= (arch // 10, arch % 10)
        and (width == 128 or arch == HOPPER or (width == 256 and arch == 86))
    ]


def instructions(mode, arch: int) -> tuple[str, str]:
    """Patterns of the tensor-core instructions of Q·Kᵀ and P·V."""
    if arch == HOPPER:
        pv = {"exact": "f32.bf16.bf16", "fp8": "f32.e4m3.e4m3", "int8": "s32.s8.s8"}[mode.name]
        return r"wgmma.mma_async\S+s32.s8.s8", rf"wgmma.mma_async\S+{pv}"
    qk = r"mma.sync.aligned.m16n8k32\S+s32.s8.s8.s32"
    pv = {"exact": "f32.bf16.bf16.f32", "fp8": "f32.e4m3.e4m3.f32", "int8": "s32.s8.s8.s32"}
    of_pv = rf"mma.sync.aligned\S+{pv[mode.name]}"
    if arch == 100 and mode.name != "int8":
        of_pv = rf"tcgen05.mma|{of_pv}"
    return qk, of_pv


@pytest.mark.parametrize(("mode", "arch", "width"), cases())
def test_kernel_uses_the_tensor_cores_and_fits(mode, arch, width, tmp_path):
    kernel = attend(mode, arch, width)
    for pattern in instructions(mode, arch):
        assert re.search(pattern, kernel.asm["ptx"])
    assert kernel.metadata.shared <= SHARED_KIB[arch] * 1024
    if width <= 128:
        assert spilled_bytes(kernel, tmp_path) == 0


@pytest.mark.parametrize(("mode", "arch"), [("exact", 86), ("int8", 86), ("fp8", 89), ("fp8", 90)])
def test_masked_kernel_fits(mode, arch):
    """A mask of float32 takes the most shared memory."""
    kernel = attend(MODES[mode], arch, 128, ADDED_MASK)
    assert kernel.metadata.shared <= SHARED_KIB[arch] * 1024


def test_causal_kernel_with_a_bool_mask_compiles():
    assert attend(MODES["exact"], HOPPER, 128, BOOL_MASK, causal=True)


# No prologue, and those of Wan and of Qwen-Image.
NONE = {"inverse": None, "weight": None, "cos": None, "sin": None, "first": 0, "eps": 0.0}
PROLOGUES = {
    "none": {**NONE, "NORM": 0, "SPLIT": False},
    "token": {"NORM": 2, "SPLIT": False, "first": 0},
    "head": {"NORM": 1, "SPLIT": True, "inverse": None},
}


def quantizers(steps: dict, arch: int, rotate: bool, width: int = 128) -> list:
    """(kernel, constants, warps, type of what is stored) as `prepare` launches them."""
    swizzled = arch == HOPPER and width == 128
    shared = {"WIDTH": width, "SWIZZLED": swizzled, "D": width}
    rotated = {**shared, **steps, "ROTATE": rotate}
    q = {**rotated, "ROWS": prepare_module.q_rows(width, rotate), "SHIFT": True}
    k = {**rotated, "GROUPS": 4 if swizzled else 1}
    k["SPREAD"] = not steps["NORM"] and not rotate
    k_warps = prepare_module.k_warps(width, 1, k["SPREAD"])
    more = width > prepare_module.MANY_CHANNELS
    chunk_warps = prepare_module.MORE_WARPS if more else prepare_module.CHUNK_WARPS
    statistics = {"ROWS": prepare_module.CHUNK_KEYS, "WIDTH": width, "D": width}
    statistics |= {"STAGES": prepare_module.CHUNK_STAGES}
    survey = {**steps, "PART": prepass.SURVEY_TOKENS, "WIDTH": width, "D": width}
    v = {**shared, "CHANNELS": prepare_module.V_CHANNELS}
    cases = [
        (prepare.quantize_q_kernel, q, 1, "i8"),
        (prepare.quantize_k_kernel, k, k_warps, "i8"),
        (values.quantize_v_kernel, {**v, "INTEGER": True}, prepare_module.V_WARPS, "i8"),
        (prepare.statistics_kernel, statistics, chunk_warps, "i8"),
        (prepare.survey_kernel, survey, 4, "i8"),
    ]
    if arch >= 89:
        constants = {**v, "INTEGER": False}
        cases.append((values.quantize_v_kernel, constants, prepare_module.V_WARPS, "fp8e4nv"))
    return cases


@pytest.mark.parametrize(
    ("arch", "name", "rotate"),
    [
        *((arch, "none", False) for arch in ARCHITECTURES),
        *((arch, "token", True) for arch in ARCHITECTURES),
        *((arch, "head", False) for arch in (86, HOPPER)),
    ],
)
def test_quantizers_keep_a_tile_in_registers(arch, name, rotate, tmp_path):
    for kernel, constants, warps, stored in quantizers(PROLOGUES[name], arch, rotate):
        of_v = kernel in (values.quantize_v_kernel, prepare.statistics_kernel)
        # V has no prologue. Of Q what does more is in the cases with one.
        of_q = kernel is prepare.quantize_q_kernel
        if (of_v and name != "none") or (of_q and name == "none" and arch not in (80, HOPPER)):
            continue
        options = {"types": {"stored": f"*{stored}"}, **prepare_module.options(warps)}
        done = compiled(kernel, constants, arch, **options)
        # Where a thread has a row. More warps, which do not spill, were slower.
        rows = kernel is prepare.quantize_k_kernel or (
            kernel is prepare.quantize_q_kernel and rotate
        )
        assert spilled_bytes(done, tmp_path) <= (200 if rows and name != "none" else 0)
        assert done.metadata.shared <= SHARED_KIB[arch] * 1024
        assert re.search(r"ld.global\S*\.v4\.b32", done.asm["ptx"])
        # A cast from FP8 is what ptxas compiles wrongly.
        assert "cvt.rn.f16x2.e4m3x2" not in done.asm["ptx"]


@pytest.mark.parametrize("width", [64, 256])
def test_quantizers_of_other_widths_keep_a_tile_in_registers(width, tmp_path):
    for kernel, constants, warps, stored in quantizers(PROLOGUES["none"], HOPPER, False, width):
        options = {"types": {"stored": f"*{stored}"}, **prepare_module.options(warps)}
        done = compiled(kernel, constants, HOPPER, **options)
        assert spilled_bytes(done, tmp_path) == 0
        assert done.metadata.shared <= SHARED_KIB[HOPPER] * 1024


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sums_of_parts_are_added_up_in_registers(arch, tmp_path):
    together = {"TOGETHER": prepare_module.TOGETHER, "WIDTH": 128}
    gather = {"LIMIT": 448.0, **together}
    sizes = (prepare_module.OFFSET_ROWS, prepare_module.OFFSET_COLUMNS, 128)
    offset = dict(zip(("ROWS", "COLUMNS", "WIDTH"), sizes, strict=True))
    names = ("partial", "sums", "mean", "means", "center", "scale", "offset")
    types = dict.fromkeys(names, "*fp32")
    options = {"types": {**types, "factor": "fp32"}, **prepare_module.options(4)}
    cases = (
        *((prepare.gather_kernel, gather), (prepare.center_kernel, together)),
        (values.offset_kernel, offset),
    )
    for kernel, constants in cases:
        done = compiled(kernel, constants, arch, **options)
        assert spilled_bytes(done, tmp_path) == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norm_of_a_token_reads_whole_vectors(arch, tmp_path):
    constants = {"ROWS": prepare_module.NORM_ROWS, "WIDTH": 128, "D": 128}
    done = compiled(prologue.inverse_rms_kernel, constants, arch, **prepare_module.options(4))
    assert spilled_bytes(done, tmp_path) == 0
    assert re.search(r"ld.global\S*\.v4\.b32", done.asm["ptx"])


def test_copies_are_written_in_whole_rows():
    """128 bytes by eight neighbouring threads. The statistics have reads under way all the time."""
    kernels = {
        case[0]: compiled(
            *case[:2], HOPPER, types={"stored": f"*{case[3]}"}, **prepare_module.options(case[2])
        )
        for case in quantizers(PROLOGUES["none"], HOPPER, False)
    }
    for kernel, elements in ((values.quantize_v_kernel, 4), (prepare.quantize_k_kernel, 16)):
        layout = rf"sizePerThread = \[1, 1, {elements}\], threadsPerWarp = \[8, 4, 1\]"
        name = re.search(rf"(#\w+) = #ttg.blocked<{{{layout}", kernels[kernel].asm["ttgir"])[1]
        stores = re.findall(r"tt.store.*", kernels[kernel].asm["ttgir"])
        assert any(f"{name}>" in store for store in stores)
    assert "cp.async" in kernels[prepare.statistics_kernel].asm["ptx"]
