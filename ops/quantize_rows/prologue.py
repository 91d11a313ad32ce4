"""What is done to a token before it is quantized, in the same pass over memory."""

from dataclasses import dataclass

import torch

NORMS = ("layer", "rms")
ACTIVATIONS = ("gelu_tanh",)
DEFAULT_EPS = 1e-6


@dataclass(frozen=True)
class Prologue:
    """Steps between a token x [K] and its quantization, in this order; absent ones are None.

    norm: "layer", (x − mean) / sqrt(variance + eps), or "rms", x / sqrt(mean(x²) + eps).
    weight, bias: [K]; x · weight + bias.
    scale, shift: [R, K] or [K]; x · (1 + scale) + shift, as AdaLN modulates. R divides the number
    of tokens M: token i takes row i // (M / R). R is the batch, or M where every token has its own.
    activation: "gelu_tanh", x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2.
    Tensors are bf16, fp16 or fp32, K-contiguous. All is computed in float32; before a rotation the
    result is rounded to the dtype of x.
    """

    norm: str | None = None
    eps: float = DEFAULT_EPS
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    activation: str | None = None

    def check(self, m: int, k: int, device: torch.device | None = None) -> None:
        """Raise ValueError or TypeError when the steps do not fit a matrix [m, k] on `device`."""
        if self.norm not in (None, *NORMS):
            raise ValueError(f"quantize_rows: norm is {self.norm!r}; known are {NORMS}, None")
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(
                f"quantize_rows: activation is {self.activation!r}; known are {ACTIVATIONS}, None"
            )
        for name in ("weight", "bias"):
            _check_tensor(name, getattr(self, name), ((k,),), f"[{k}]", device)
        for name in ("scale", "shift"):
            value = getattr(self, name)
            rows = value.shape[0] if value is not None and value.dim() == 2 else 1
            if rows and m % rows:
                raise ValueError(
                    f"quantize_rows: {name} has {rows} rows, which do not divide {m} tokens"
                )
            _check_tensor(name, value, ((k,), (rows, k)), f"[{k}] or [rows, {k}]", device)


def _check_tensor(name: str, value, shapes, wanted: str, device: torch.device | None) -> None:
    if value is None:
        return
    if value.device != device:
        raise ValueError(f"quantize_rows: {name} is on {value.device}, x on {device}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"quantize_rows: {name} is {list(value.shape)}; {wanted} is wanted")
    if value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"quantize_rows: {name} is {value.dtype}; cast it to a float of 16 or 32")
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(f"quantize_rows: {name} is not K-contiguous; call .contiguous() on it")


def rows_of(value: torch.Tensor | None, m: int) -> tuple[int, int]:
    """Return (stride of the rows, tokens of a row) of a modulation."""
    if value is None or value.dim() == 1 or value.shape[0] == 1:
        return 0, m
    return value.stride(0), m // value.shape[0]
