"""The Hopper backend of `fp4_scaled_mm`: CUDA C++, compiled by torch's NVRTC when first called."""

import ctypes
import functools
from pathlib import Path

import torch

from ..cuda import nvrtc
from ..cuda.hopper import HOPPER, OPTIONS, missing
from ..cuda.hopper import source as cuda_source
from ..cuda.kernel import address
from ..cuda.tensor_map import tensor_map
from ..quantize_rows.order import BLOCK
from ..registry import Backend, Needs, register
from . import OP, SCHEMES
from .tiles import ROW_BYTES, Tile, choose

# 16 bytes of a row of the result are stored together.
N_MULTIPLE = 8
FOLDER = Path(__file__).with_name("kernels")
SOURCES = ("decode.cu", "tile.cu", "finish.cu", "multiply.cu")
# Of the result and of the bias, as the kernel names them.
TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
GROUP_THREADS = 128
# Of a block of swizzled scales.
SCALE_BLOCK_BYTES, SCALE_COLUMNS = 512, 4
ALIGNMENT = 1024
# That the kernel counts with, and its compiler is not to know.
NUMBERS = (2, 0x40404040)


class Params(ctypes.Structure):
    """The kernel's first parameter, `struct Params` in tile.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scale", "token_scale", "tensor_scale", "bias")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("token_step", "bias_type", "rows", "tokens")),
        *((name, ctypes.c_int) for name in ("stages", "scale_rows", "scale_columns")),
        *((name, ctypes.c_int) for name in ("two", "positive")),
    )


def instruction(tokens: int) -> str:
    """Return the CUDA C++ of `multiply`: d [64, tokens] += a [64, 32] · b [tokens, 32]ᵀ, of E4M3.

    d and a are in registers, b in shared memory.
    """
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    left = ", ".join(f"%{count + i}" for i in range(4))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void multiply(float (&d)[{count}], const u32* a, u64 b) {{
    asm volatile("{{.reg .pred p; setp.ne.b32 p, 1, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{tokens}k32.f32.e4m3.e4m3 "
        "{{{sums}}}, {{{left}}}, %{count + 4}, p, 1, 1;}}"
        : {operands}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}
"""


def source(tile: Tile) -> str:
    """Return the CUDA C++ source, of all its files."""
    rest = ((FOLDER / name).read_text(encoding="utf-8") for name in SOURCES)
    return "\n".join((cuda_source(), instruction(tile.tokens), *rest))


def options(tile: Tile, group: int, out_dtype: torch.dtype) -> tuple[str, ...]:
    """Return NVRTC's options for one tile, kind of weight and type of the result."""
    defined = {
        **{"GROUP": group, "GROUPS": tile.groups, "TOKENS": tile.tokens, "OUT": TYPES[out_dtype]},
        **{"STAGES": tile.stages, "PARTS": tile.parts, "TURNS": tile.turns},
    }
    return (*OPTIONS, *(f"-D{name}={value}" for name, value in defined.items()))


@functools.cache
def _kernel(tile: Tile, group: int, out_dtype: torch.dtype, device: int) -> nvrtc.Kernel:
    code = nvrtc.machine_code(source(tile), options(tile, group, out_dtype))
    return nvrtc.Kernel(code, "fp4_scaled_mm", tile.shared_bytes + ALIGNMENT)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(x, x_scale, packed, scale, tensor_scale, bias, n, group, out_dtype) -> torch.Tensor:
    """Return the product as `fp4_scaled_mm` describes it."""
    tile = choose(_processors(x.device), x.shape[0], n, x.shape[1])
    return run_tile(x, x_scale, packed, scale, tensor_scale, bias, n, group, out_dtype, tile)


def run_tile(
    x, x_scale, packed, scale, tensor_scale, bias, n, group, out_dtype, tile: Tile
) -> torch.Tensor:
    """Return the product as `fp4_scaled_mm` describes it, cut into `tile`."""
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            arguments = (x, x_scale, packed, scale, tensor_scale, bias, n, group, out_dtype, tile)
            return run_tile(*arguments)
    m, k = x.shape
    # Copies start at multiples of 16 bytes; a weight that is mapped from a file may not.
    x, packed, scale = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (x, packed, scale))
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(m, n, dtype=out_dtype)
    scale_columns = k // group // SCALE_COLUMNS
    tensors = (scale, x_scale, tensor_scale, bias, out)
    params = Params(
        *map(address, tensors),
        int(x_scale.numel() > 1),
        0 if bias is None else TYPES[bias.dtype],
        *(n, m, k // BLOCK),
        *(scale.numel() // (scale_columns * SCALE_BLOCK_BYTES), scale_columns),
        *NUMBERS,
    )
    maps = (
        tensor_map(x, (tile.tokens, BLOCK)),
        tensor_map(packed, (tile.rows, ROW_BYTES), swizzle=0),
    )
    grid = (-(-m // tile.tokens), -(-n // tile.rows), tile.parts)
    # One more warpgroup copies.
    threads = GROUP_THREADS * (tile.groups * tile.turns + 1)
    kernel = _kernel(tile, group, out_dtype, x.device.index)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel.launch(grid, threads, (params, *maps), stream, early=True)
    return out


NEEDS = Needs(
    frozenset(SCHEMES),
    devices=frozenset({"cuda"}),
    capability=HOPPER,
    measured=(HOPPER, (9, 1)),
    k_multiple=BLOCK,
    n_multiple=N_MULTIPLE,
    self_test=missing,
)
register(Backend(OP, "hopper", 10, NEEDS, run))
