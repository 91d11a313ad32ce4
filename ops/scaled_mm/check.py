"""What `scaled_mm` accepts, checked before any kernel runs."""

from typing import NamedTuple

import torch

from ..custom_op import watched
from ..tuning import REMEMBERED

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = ("gelu_tanh",)
# Of the factors of a low-rank term.
LOW_RANK = (torch.bfloat16, torch.float16)
# Bytes that a TMA descriptor's rows, and the widest loads, are aligned to.
K_MULTIPLE = 16
GIVEN = ("b", "scale_a", "scale_b", "bias", "zero_point", "column_sum", "gate", "residual")
# Side of the blocks that share a scale: 1 x BLOCK of a, BLOCK x BLOCK of b.
BLOCK = 128
# The kernel for many rows is the fastest from so many on, on an H200, with a low-rank term earlier.
MANY_ROWS, MANY_ROWS_WITH_TERM = 2048, 1024
# Ranks that it adds, one stage left for a residual; and of which it makes h within.
MAX_RANKS, MADE_RANKS = 192, 64
# Kinds of tensors that fit together.
_right: set[tuple] = set()


class Down(NamedTuple):
    """The first matrix of a low-rank term: h = scale_a · scale · (a · storedᵀ) + shift, [M, R].

    stored: [R, K], of a's dtype, K-contiguous rows a multiple of 16 apart. scale: [R, 1] float32,
    contiguous. shift: [R] float32, contiguous, or None.
    """

    stored: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None = None


def granularity(a, b, scale_a, scale_b) -> str:
    """Return what shares a scale: `tensor` (of both operands), `row` (of one at least) or `block`.

    Where K and N are one block, a scale per block is a scale per row of a and one of b: `row`.
    """
    both = scale_a.dim() == 2 and scale_b.dim() == 2
    # The first comparison alone, which rows of more than a block fail, is what most calls pay for.
    if both and scale_b.shape[1] == -(-a.shape[1] // BLOCK):
        of_a, of_b = _blocks(a, b)
        if tuple(scale_a.shape) == of_a and tuple(scale_b.shape) == of_b != (1, 1):
            return "block"
    return "tensor" if scale_a.numel() == 1 and scale_b.numel() == 1 else "row"


def scheme(a, b, scale_a, scale_b) -> str:
    """Return the name under which backends register what they can do: operands, then scales.

    Operands: `int8`, `fp8` (E4M3), `fp8_mixed` (one is E5M2) or `fp8_e5m2` (both are). Scales:
    `tensor`, `row` or `block`. What follows the sums is left out: every backend does all of it.
    """
    operands = "int8"
    if a.dtype != torch.int8:
        operands = ("fp8", "fp8_mixed", "fp8_e5m2")[FP8.index(a.dtype) + FP8.index(b.dtype)]
    return f"{operands}_{granularity(a, b, scale_a, scale_b)}"


def _blocks(a, b) -> tuple[tuple[int, int], tuple[int, int]]:
    columns = -(-a.shape[1] // BLOCK)
    return (a.shape[0], columns), (-(-b.shape[0] // BLOCK), columns)


def check(
    a,
    b,
    scale_a,
    scale_b,
    bias,
    zero_point,
    column_sum,
    activation,
    gate,
    residual,
    out_dtype,
) -> None:
    """Raise TypeError or ValueError when arguments of `scaled_mm` do not fit together.

    No value decides on that: what was right once is so for all tensors of the same kinds.
    """
    tensors = (a, b, scale_a, scale_b, bias, zero_point, column_sum, gate, residual)
    # A compiled graph makes its own conditions of what is looked at.
    if watched(a) or activation is not None or out_dtype not in OUTPUTS:
        _check(*tensors, activation, out_dtype)
        return
    kinds = tuple(
        [None if x is None else (x.dtype, x.shape, x.stride(), x.device) for x in tensors]
    )
    if kinds not in _right:
        _check(*tensors, activation, out_dtype)
        if len(_right) >= REMEMBERED:
            _right.clear()
        _right.add(kinds)


def _check(
    a, b, scale_a, scale_b, bias, zero_point, column_sum, gate, residual, activation, out_dtype
) -> None:
    """Raise TypeError or ValueError as `check` does, and look at everything."""
    _check_operands(a, b)
    m, n = a.shape[0], b.shape[0]
    _check_scales(a, b, scale_a, scale_b)
    if bias is not None:
        _check_values("bias", bias, (n,), "one per output")
        _check_contiguous("bias", bias)
    _check_zero_point(a, b, scale_a, scale_b, zero_point, column_sum)
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"scaled_mm: activation is {activation!r}; None and {', '.join(ACTIVATIONS)} are known"
        )
    if gate is not None:
        _check_gate(gate, m, n)
    if residual is not None:
        _check_values("residual", residual, (m, n), "the shape of the result")
        _check_rows("residual", residual)
    if out_dtype not in OUTPUTS:
        raise TypeError(f"scaled_mm: out_dtype is {out_dtype}; {_names(OUTPUTS)} are known")
    device = a.device
    given = (b, scale_a, scale_b, bias, zero_point, column_sum, gate, residual)
    for name, tensor in zip(GIVEN, given, strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"scaled_mm: {name} is on {tensor.device}, a on {device}; move both to one device"
            )


def is_few(rows: int, rank: int) -> bool:
    """Return whether rows are too few for the kernel for many, or a term's rank too high."""
    return rows < (MANY_ROWS_WITH_TERM if rank else MANY_ROWS) or rank > MAX_RANKS


def check_low_rank(a, b, scale_a, scale_b, zero_point, h, u) -> None:
    """Raise TypeError or ValueError when h [M, R] and u [N, R] do not fit a [M, K] and b [N, K].

    h: or a `Down`.
    """
    if isinstance(h, Down):
        _check_down(a, b, scale_a, scale_b, zero_point, h, u)
        return
    if h.dtype not in LOW_RANK or u.dtype != h.dtype:
        raise TypeError(
            f"scaled_mm: h is {h.dtype}, u {u.dtype}; both in one of {_names(LOW_RANK)} are wanted"
        )
    for name, x, count in (("h", h, a.shape[0]), ("u", u, b.shape[0])):
        if x.dim() != 2 or x.shape[0] != count or x.shape[1] != h.shape[1] or not x.shape[1]:
            raise ValueError(
                f"scaled_mm: {name} is {list(x.shape)}; [{count}, R] is wanted, one R > 0 for both"
            )
        _check_rows(name, x)
        if x.device != a.device:
            raise ValueError(f"scaled_mm: {name} is on {x.device}, a on {a.device}; move it there")


def _check_down(a, b, scale_a, scale_b, zero_point, down: Down, u) -> None:
    (stored, scale, shift), rank, k = down, len(down.stored), a.shape[1]
    if stored.dtype != a.dtype or u.dtype not in LOW_RANK:
        raise TypeError(
            f"scaled_mm: down is {stored.dtype}, u {u.dtype}; {a.dtype} as a, and one of "
            f"{_names(LOW_RANK)} are wanted"
        )
    if tuple(u.shape) != (len(b), rank) or not rank or stored.shape[1] != k:
        raise ValueError(
            f"scaled_mm: down is {list(stored.shape)}, u {list(u.shape)}; [R, {k}] and "
            f"[{len(b)}, R], one R > 0 for both, are wanted"
        )
    _check_rows("u", u)
    if stored.stride(1) != 1 or stored.stride(0) % K_MULTIPLE:
        raise ValueError(f"scaled_mm: down's rows lie {tuple(stored.stride())} apart; see a and b")
    for name, x in (("scale", scale), ("shift", shift)):
        if x is not None and (x.dtype != torch.float32 or x.numel() != rank):
            raise ValueError(
                f"scaled_mm: down's {name} is {x.dtype} {list(x.shape)}; {rank} float32"
            )
        if x is not None:
            _check_contiguous(f"down's {name}", x)
    if zero_point is not None or granularity(a, b, scale_a, scale_b) == "block":
        raise ValueError("scaled_mm: down goes with no zero point and no block scales")
    for x in (*down, u):
        if x is not None and x.device != a.device:
            raise ValueError(f"scaled_mm: a term is on {x.device}, a on {a.device}; move it there")


def _names(dtypes) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _check_operands(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype != torch.int8 and x.dtype not in FP8:
            raise TypeError(
                f"scaled_mm: {name} is {x.dtype}; torch.int8 or {_names(FP8)} is wanted: "
                "quantize it first (ops.quantize_rows, or a format for weights)"
            )
        if x.dim() != 2:
            raise ValueError(f"scaled_mm: {name} is {list(x.shape)}; two dimensions are wanted")
    if (a.dtype == torch.int8) != (b.dtype == torch.int8):
        raise TypeError(
            f"scaled_mm: a is {a.dtype}, b is {b.dtype}; both INT8 or both FP8 are wanted"
        )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"scaled_mm: a is {list(a.shape)}, b is {list(b.shape)}; a [M, K] and b [N, K] are "
            "wanted: b is not transposed"
        )
    k = a.shape[1]
    if k == 0 or k % K_MULTIPLE:
        raise ValueError(
            f"scaled_mm: K={k} is not a positive multiple of {K_MULTIPLE}; pad both operands "
            "with zeros, or leave the layer out"
        )
    for name, x in (("a", a), ("b", b)):
        apart = x.stride(0) % K_MULTIPLE or x.stride(0) < k
        # What lies between rows is no matter where there is one.
        if x.numel() and (x.stride(1) != 1 or (apart and x.shape[0] > 1)):
            raise ValueError(
                f"scaled_mm: {name} has strides {tuple(x.stride())}; K-contiguous rows, a multiple "
                f"of {K_MULTIPLE} apart, are wanted: call .contiguous() on it before"
            )


def _check_scales(a, b, scale_a, scale_b) -> None:
    blocks = granularity(a, b, scale_a, scale_b) == "block"
    for name, scale, x in (("scale_a", scale_a, a), ("scale_b", scale_b, b)):
        if scale.dtype != torch.float32:
            raise TypeError(f"scaled_mm: {name} is {scale.dtype}; torch.float32 is wanted")
        rows = x.shape[0]
        if scale.numel() == 1 or blocks:
            continue
        if tuple(scale.shape) not in ((rows, 1), (rows,), (1, rows)):
            of_a, of_b = _blocks(a, b)
            raise ValueError(
                f"scaled_mm: {name} is {list(scale.shape)}; one scale, or [{rows}, 1] with one per "
                f"row of {name[-1]}, is wanted, or one per block of both: scale_a {list(of_a)} for "
                f"1x{BLOCK} and scale_b {list(of_b)} for {BLOCK}x{BLOCK}"
            )
        _check_contiguous(name, scale)
    # Of a's blocks, any strides: some quantizers write the scales of a column side by side.
    if blocks:
        _check_contiguous("scale_b", scale_b)


def _check_contiguous(name: str, x: torch.Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"scaled_mm: {name} is not contiguous; call .contiguous() on it before")


def _check_values(name: str, x: torch.Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"scaled_mm: {name} is {list(x.shape)}; {list(shape)} is wanted, {what}")
    if x.dtype not in OUTPUTS:
        raise TypeError(f"scaled_mm: {name} is {x.dtype}; cast it to {_names(OUTPUTS)}")


def _check_rows(name: str, x: torch.Tensor) -> None:
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(
            f"scaled_mm: {name} has strides {tuple(x.stride())}; contiguous rows are wanted: call "
            ".contiguous() on it before"
        )


def _check_gate(gate: torch.Tensor, m: int, n: int) -> None:
    rows = gate.shape[0] if gate.dim() == 2 else 0
    if m % rows if rows else m or gate.dim() != 2:
        raise ValueError(
            f"scaled_mm: gate is {list(gate.shape)}; [R, {n}] is wanted, whose R divides M={m}: "
            "one row, or one for each of the M / R rows of a that follow each other"
        )
    _check_values("gate", gate, (rows, n), "one per output")
    _check_rows("gate", gate)


def _check_zero_point(a, b, scale_a, scale_b, zero_point, column_sum) -> None:
    if (zero_point is None) != (column_sum is None):
        raise ValueError("scaled_mm: zero_point and column_sum are given together or not at all")
    if zero_point is None:
        return
    if a.dtype != torch.int8:
        raise TypeError(f"scaled_mm: a zero point needs INT8 operands, a is {a.dtype}")
    if granularity(a, b, scale_a, scale_b) == "block":
        raise ValueError(
            "scaled_mm: a zero point with one scale per block; give one scale per row, or none"
            " of zero_point and column_sum"
        )
    rows = {"zero_point": (zero_point, a.shape[0]), "column_sum": (column_sum, b.shape[0])}
    for name, (x, count) in rows.items():
        if x.dtype != torch.int32 or tuple(x.shape) != (count,) or not x.is_contiguous():
            raise ValueError(
                f"scaled_mm: {name} is {x.dtype} {list(x.shape)}; contiguous torch.int32 [{count}] "
                "is wanted"
            )
