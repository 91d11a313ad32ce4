"""The Triton backend of `decode_fp4`: how its kernel is launched."""

import torch

from ..launch import ALIGNMENT, TRITON_MIN, alignment, dependent, launch
from ..registry import Backend, Needs, register
from . import E4M3, OP

# Of a program. Eight rows, two in each quarter of a block of scales, use its sectors whole.
ROWS, COLUMNS, WARPS = 8, 1024, 4
BLOCK_ROWS = 128
# Scales in a word of 32 bits.
WORD = 4


def words(scale: torch.Tensor) -> torch.Tensor:
    """Return swizzled scales, one byte each, as words; a copy where they start in between."""
    flat = scale.reshape(-1)
    if flat.data_ptr() % WORD:
        flat = flat.clone()
    return flat.view(torch.int32)


def run(packed, scale, tensor_scale, n, k, group, dtype):
    """Return (stored [n, K'], scale of the rows [n, 1] or None) as `decode_fp4` describes them."""
    from .kernel import decode_fp4_kernel

    columns = 2 * packed.shape[1]
    stored = packed.new_empty(n, columns, dtype=dtype)
    rows = packed.new_empty(n, 1, dtype=torch.float32) if dtype == E4M3 else None
    tensor_scale = tensor_scale if dtype == E4M3 else None
    scale = words(scale)
    row_words = -(-columns // group // WORD)
    early = dependent(packed.device)
    ragged = -(-k // group) != row_words * WORD
    e4m3_words = row_words if rows is not None else None
    constants = (group, ROWS, COLUMNS, e4m3_words, ragged, columns > k, bool(early))
    sizes = (n, k, columns, row_words)
    tensors = (packed, scale, tensor_scale, stored, rows)
    divisible = tuple((size % ALIGNMENT == 0, size == 1) for size in sizes)
    programs = -(-n // BLOCK_ROWS) * (BLOCK_ROWS // ROWS) * -(-columns // COLUMNS)
    key = (dtype, alignment(*tensors), divisible, constants)
    options = {"num_warps": WARPS, "enable_fp_fusion": False, **early}
    launch(decode_fp4_kernel, programs, (*tensors, *sizes, *constants), options, key, packed.device)
    return stored, rows


def _register(to: str, least: tuple[int, int]) -> None:
    needs = Needs(
        frozenset({f"nvfp4_{to}", f"mxfp4_{to}"}),
        devices=frozenset({"cuda"}),
        capability=least,
        package="triton",
        package_min=TRITON_MIN,
    )
    register(Backend(OP, "triton", 10, needs, run))


_register("float", (8, 0))
# Triton has no FP8 types below.
_register("e4m3", (8, 9))
