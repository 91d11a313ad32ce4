"""What `scaled_mm` accepts, checked before any kernel runs."""

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
# Bytes that a TMA descriptor's rows, and the widest loads, are aligned to.
K_MULTIPLE = 16


def check(a, b, scale_a, scale_b, bias, zero_point, column_sum, out_dtype) -> None:
    """Raise TypeError or ValueError when arguments of `scaled_mm` do not fit together."""
    _check_operands(a, b)
    m, n = a.shape[0], b.shape[0]
    _check_scale("scale_a", scale_a, m, "row of a")
    _check_scale("scale_b", scale_b, n, "row of b")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"scaled_mm: bias is {list(bias.shape)}; [{n}] is wanted, one per output")
    if bias is not None and bias.dtype not in OUTPUTS:
        raise TypeError(f"scaled_mm: bias is {bias.dtype}; cast it to {_names(OUTPUTS)}")
    _check_zero_point(a, zero_point, column_sum, m, n)
    if out_dtype not in OUTPUTS:
        raise TypeError(f"scaled_mm: out_dtype is {out_dtype}; {_names(OUTPUTS)} are known")
    given = {
        "b": b,
        "scale_a": scale_a,
        "scale_b": scale_b,
        "bias": bias,
        "zero_point": zero_point,
        "column_sum": column_sum,
    }
    for name, tensor in given.items():
        if tensor is not None and tensor.device != a.device:
            raise ValueError(
                f"scaled_mm: {name} is on {tensor.device}, a on {a.device}; move both to one device"
            )


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
        if x.numel() and (x.stride(1) != 1 or x.stride(0) % K_MULTIPLE or x.stride(0) < k):
            raise ValueError(
                f"scaled_mm: {name} has strides {tuple(x.stride())}; K-contiguous rows, a multiple "
                f"of {K_MULTIPLE} apart, are wanted: call .contiguous() on it before"
            )


def _check_scale(name: str, scale: torch.Tensor, rows: int, what: str) -> None:
    if scale.dtype != torch.float32:
        raise TypeError(f"scaled_mm: {name} is {scale.dtype}; torch.float32 is wanted")
    if scale.numel() != 1 and tuple(scale.shape) not in ((rows,), (rows, 1), (1, rows)):
        raise ValueError(
            f"scaled_mm: {name} is {list(scale.shape)}; one scale, or [{rows}, 1] with one per "
            f"{what}, is wanted"
        )
    if scale.numel() > 1 and not scale.is_contiguous():
        raise ValueError(f"scaled_mm: {name} is not contiguous; call .contiguous() on it before")


def _check_zero_point(a, zero_point, column_sum, m: int, n: int) -> None:
    if (zero_point is None) != (column_sum is None):
        raise ValueError("scaled_mm: zero_point and column_sum are given together or not at all")
    if zero_point is None:
        return
    if a.dtype != torch.int8:
        raise TypeError(f"scaled_mm: a zero point needs INT8 operands, a is {a.dtype}")
    for name, x, rows in (("zero_point", zero_point, m), ("column_sum", column_sum, n)):
        if x.dtype != torch.int32 or tuple(x.shape) != (rows,) or not x.is_contiguous():
            raise ValueError(
                f"scaled_mm: {name} is {x.dtype} {list(x.shape)}; contiguous torch.int32 [{rows}] "
                "is wanted"
            )
