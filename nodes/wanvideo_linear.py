"""A linear layer that stands in for one of WanVideoWrapper's, its unmerged LoRAs beside the weight.

That pack hands LoRAs that are not merged to its own `CustomLinear`, which adds them to the weight
in every call. The layer here is of a class below that one, so that it gets them, and strengths by
step, in the same way; it computes y = W·x + strength · B·(A·x), so W may be quantized.
Source: kijai/ComfyUI-WanVideoWrapper 1.4.6, custom_linear.py (what LoRAs are kept as, and their
factor alpha / rank).
"""

import functools

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ..ops.linear import linear, release, share


class SideBranches:
    """Mixed into that pack's `CustomLinear`. `weight` is dense, or quantized and then a buffer.

    That pack moves blocks by `Module.to`, which takes any buffer, but writes to the data of some
    Parameters, which a quantized weight does not allow.
    full_precision: products of a quantized weight are to be in the input's dtype. readers: layers
    that read the same tensor, this one included, and quantize it once.
    """

    full_precision = False
    readers = 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return W·x + bias and the LoRAs' share, [..., N], in the dtype of the input [..., K]."""
        share(input, self.readers)
        try:
            return self._with_loras(input, self._product(input))
        finally:
            release(input)

    def after_gelu(self, input: torch.Tensor) -> torch.Tensor:
        """Return forward(gelu(input)), in one pass where no LoRA needs the GELU as well."""
        if self._is_low_bit() and not self._has_loras():
            return linear(input, self.weight, self._bias(input), input_act="gelu_tanh")
        return self(F.gelu(input, approximate="tanh"))

    def set_lora_diffs(self, lora_diffs, device=None) -> None:
        """Take LoRAs, on the device of the weight: a layer without bias tells no other."""
        super().set_lora_diffs(lora_diffs, device=self.weight.device)

    def set_lora_strengths(self, lora_strengths, device=None) -> None:
        """Take the strengths of LoRAs, on the device of the weight."""
        super().set_lora_strengths(lora_strengths, device=self.weight.device)

    def _is_low_bit(self) -> bool:
        return isinstance(self.weight, QuantizedTensor) and not self.full_precision

    def _bias(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_low_bit():
            return linear(x, self.weight, self._bias(x))
        weight = self.weight
        if isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        return F.linear(x, weight.to(x), self._bias(x))

    def _has_loras(self) -> bool:
        # That pack takes LoRAs away by taking these buffers; their names stay in `lora_diffs`.
        return hasattr(self, "lora_diff_0_0")

    def _with_loras(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if not self._has_loras():
            return out
        for index, names in enumerate(self.lora_diffs):
            strength = self._get_lora_strength(index)
            if not isinstance(names, tuple):
                out = out + F.linear(x, getattr(self, names).to(x)) * strength.to(x)
                continue
            up, down, alpha = (getattr(self, name) for name in names)
            factor = float(alpha) / down.shape[0] if alpha else 1.0
            inner = F.linear(x, down.flatten(1).to(x)) * (strength * factor).to(x)
            out = out + F.linear(inner, up.flatten(1).to(x))
        return out


@functools.cache
def _class(custom_linear: type) -> type:
    return type("LowBitLinear", (SideBranches, custom_linear), {})


def stand_in(
    custom_linear: type,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    compute_dtype: torch.dtype,
) -> torch.nn.Module:
    """Return a layer for the place of one of that pack's, which is left alone.

    custom_linear: that pack's class. weight: [N, K], dense or a `QuantizedTensor`. bias: [N] or
    None. compute_dtype: of the LoRAs.
    """
    n, k = weight.shape
    new = _class(custom_linear)(k, n, False, compute_dtype=compute_dtype, device="meta")
    del new.weight
    if isinstance(weight, QuantizedTensor):
        new.register_buffer("weight", weight)
    else:
        new.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = torch.nn.Parameter(bias, requires_grad=False)
    return new.eval()
