"""4-bit weights decoded: E2M1 times the scales of its blocks, in 16 bits exactly, or in E4M3."""

import torch

from .. import registry
from ..custom_op import custom_op

OP = "decode_fp4"
# Elements along K that share a scale: E4M3 scales, and powers of two (E8M0).
NVFP4_GROUP, MXFP4_GROUP = 16, 32
# The values of codes 0 to 15; the sign is the highest bit.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *(-m for m in _MAGNITUDES))
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
E4M3 = torch.float8_e4m3fn
SCHEMES = tuple(f"{name}_{to}" for name in ("nvfp4", "mxfp4") for to in ("float", "e4m3"))
SCALE_ROWS, SCALE_COLUMNS = 128, 4


def decode_fp4(
    packed: torch.Tensor,
    scale: torch.Tensor,
    shape: tuple[int, int],
    group: int,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> torch.Tensor:
    """Return E2M1 · scale of its block, [N, K'] of `dtype`, exact; a tensor's scale is left out.

    packed: [≥ N, K' / 2] uint8, contiguous, the even column in the high nibble. scale: of blocks of
    `group` elements along K, one byte each, swizzled in blocks of 128 rows x 4 (padded to them):
    E4M3 for group 16 (NVFP4), E8M0 for 32 (MXFP4). shape: logical [N, K]; K' is K padded to the
    group or beyond, and columns from K on are 0. dtype: bfloat16, float16 or float32. MXFP4's
    products beyond float16's range are Inf there, below 2^-23 they are rounded. A scale of NaN
    gives NaN; what the padding of scales holds, as files of other programs may, shows nowhere.
    Raises TypeError or ValueError when arguments do not fit, NoBackendError when no backend can run
    them.
    """
    if dtype not in FLOATS:
        raise TypeError(f"decode_fp4: to {dtype}; {', '.join(map(str, FLOATS))} are known")
    check(packed, scale, None, shape, group)
    return _OP(packed, scale.view(torch.uint8), None, *shape, group, dtype, backend)[0]


def decode_fp4_e4m3(
    packed: torch.Tensor,
    scale: torch.Tensor,
    tensor_scale: torch.Tensor | None,
    shape: tuple[int, int],
    group: int,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (stored [N, K'] E4M3, scale [N, 1] float32): the weight ≈ stored · scale.

    tensor_scale: one float32 element, or None; it is in the scale that comes back. Other arguments
    and errors: as `decode_fp4` has them.
    A row's scale is 1.5 · 2^k for NVFP4, so that the codes ±1.5, 3 and 6 are exact and the others
    rounded to three mantissa bits, and 2^k for MXFP4, which is exact where a block's scale is not
    below 2^-14 of the row's largest. k is the least with which nothing exceeds 448.
    """
    check(packed, scale, tensor_scale, shape, group)
    return _OP(packed, scale.view(torch.uint8), tensor_scale, *shape, group, E4M3, backend)


def check(packed, scale, tensor_scale, shape: tuple[int, int], group: int) -> None:
    """Raise TypeError or ValueError when these are no 4-bit weight, as `decode_fp4` has them."""
    if group not in (NVFP4_GROUP, MXFP4_GROUP):
        raise ValueError(f"decode_fp4: group is {group}; 16 (NVFP4) and 32 (MXFP4) are known")
    if packed.dtype != torch.uint8 or packed.dim() != 2 or not packed.is_contiguous():
        raise TypeError(
            f"decode_fp4: packed is {packed.dtype} {list(packed.shape)}; contiguous uint8 "
            "[N, K / 2] is wanted"
        )
    n, k = shape
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % group or rows < n or columns < k:
        raise ValueError(
            f"decode_fp4: packed holds [{rows}, {columns}]; at least [{n}, {k}], with columns in "
            f"blocks of {group}, are wanted"
        )
    wide = -(-(columns // group) // SCALE_COLUMNS) * SCALE_COLUMNS
    # Rows may be padded with those of `packed`, or only as far as the block goes.
    least = -(-n // SCALE_ROWS) * SCALE_ROWS * wide
    most = -(-rows // SCALE_ROWS) * SCALE_ROWS * wide
    if scale.element_size() != 1 or scale.numel() not in (least, most):
        raise ValueError(
            f"decode_fp4: scale is {scale.dtype} with {scale.numel()} elements; {most} of one byte "
            f"are wanted, one per {group} of [{rows}, {columns}], swizzled"
        )
    check_devices("decode_fp4", packed.device, scale=scale, tensor_scale=tensor_scale)
    if tensor_scale is None:
        return
    if tensor_scale.numel() != 1 or tensor_scale.dtype != torch.float32:
        raise ValueError(
            f"decode_fp4: tensor_scale is {tensor_scale.dtype} {list(tensor_scale.shape)}; one "
            "float32 element is wanted"
        )


def check_devices(what: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError when any of the tensors is not where the weight is."""
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(
                f"{what}: {name} is on {x.device}, the weight on {device}; move both to one device"
            )


def _run(packed, scale, tensor_scale, n, k, group, dtype, backend):
    scheme = _scheme(group, dtype)
    call = registry.Call(scheme, packed.device, n, k)
    run = registry.select(OP, call, backend).run
    if n == 0 or packed.numel() == 0:
        return _empty(packed, scale, tensor_scale, n, k, group, dtype, backend)
    stored, rows = run(packed, scale, tensor_scale, n, k, group, dtype)
    return stored, packed.new_empty(0, dtype=torch.float32) if rows is None else rows


def _scheme(group: int, dtype: torch.dtype) -> str:
    name = "nvfp4" if group == NVFP4_GROUP else "mxfp4"
    return f"{name}_{'e4m3' if dtype == E4M3 else 'float'}"


def _empty(packed, scale, tensor_scale, n, k, group, dtype, backend):
    rows = (n, 1) if dtype == E4M3 else (0,)
    stored = packed.new_empty(n, 2 * packed.shape[1], dtype=dtype)
    return stored, packed.new_empty(rows, dtype=torch.float32)


_OP = custom_op(
    "decode_fp4(Tensor packed, Tensor scale, Tensor? tensor_scale, SymInt n, SymInt k, int group, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _run,
    _empty,
)
registry.discover(__name__)
