"""A Linear that multiplies in low precision, put in the place of another that it can be undone to.

The class of the module is a subclass of the original's, so that whoever asks what it is finds what
was there; weight and bias stay parameters of these names.
"""

import copy
import functools

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

from ..scaled_mm.check import FP8
from . import linear
from .fp8 import check_base_dtype, check_input, fp8_linear_forward
from .nvfp4 import NVFP4Layout, nvfp4_linear
from .sharing import release, share
from .weight import parameter

# float32 attributes beside an FP8 weight, not in the state_dict.
SCALES = ("scale_weight", "scale_input")


class LowBitLinear:
    """What a converted Linear adds to the class of the original, mixed in before it.

    A quantized or FP8 weight is multiplied as such, and the output is of `base_dtype`, or of the
    input's dtype where that is None; with any other weight the module computes as the original's
    class does. `.to(dtype)` leaves an FP8 weight and its scales as they are, for a cast weight
    would have lost its scale; of a quantized weight it changes the dtype of what it dequantizes to.
    There are no gradients through either.
    """

    base_dtype: torch.dtype | None
    # Of these layers that read the same tensor one after the other; they quantize it once.
    readers: int = 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the output [..., N] for input [..., K]; see `fp8_linear_forward`."""
        weight = self.weight
        if self.base_dtype is None and is_quantized(weight):
            check_input(input, weight)
            return self._run(input)
        if is_nvfp4(weight):
            check_input(input, weight)
            return nvfp4_linear(input, weight, self.bias, self.base_dtype)
        if weight.dtype in FP8 and not isinstance(weight, QuantizedTensor):
            return fp8_linear_forward(self, self.base_dtype, input)
        return super().forward(input)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        if self.readers < 2:
            return linear(x, self.weight, self.bias)
        share(x, self.readers)
        try:
            return linear(x, self.weight, self.bias)
        finally:
            release(x)

    def _apply(self, fn, recurse=True):
        """Move or cast as `nn.Module` does, but for what is stored: that only moves."""
        scales = {name: self.__dict__[name] for name in SCALES if name in self.__dict__}
        stored = {id(getattr(self, name, None)) for name in SCALES}

        def moved(tensor):
            if id(tensor) not in stored and tensor.dtype not in FP8:
                return fn(tensor)
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        weight = self._parameters.get("weight")
        if not is_quantized(weight):
            super()._apply(moved, recurse)
        else:
            replaced = parameter(fn(weight))
            # nn.Module would set `.data`, which leaves the payload where it was.
            self._parameters["weight"] = None
            try:
                super()._apply(moved, recurse)
            finally:
                self._parameters["weight"] = weight
            self._parameters["weight"] = replaced
        for name, scale in scales.items():
            self.__dict__[name] = None if scale is None else moved(scale)
        return self

    def __deepcopy__(self, memo):
        """Return a copy; that of a QuantizedTensor is made here, since it cannot make its own."""
        new = _blank(self._original_class)
        memo[id(self)] = new
        weight = self._parameters.get("weight")
        if is_quantized(weight):
            memo[id(weight)] = parameter(weight.clone())
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def is_quantized(weight: torch.Tensor | None) -> bool:
    """Return whether `weight` is in a layout of this pack, of any format."""
    return isinstance(weight, QuantizedTensor) and hasattr(weight.layout_cls, "scheme")


def is_nvfp4(weight: torch.Tensor | None) -> bool:
    """Return whether `weight` is in NVFP4, in this pack's layout."""
    return isinstance(weight, QuantizedTensor) and issubclass(weight.layout_cls, NVFP4Layout)


@functools.cache
def _class_of(original: type) -> type:
    return type(
        f"LowBit{original.__name__}", (LowBitLinear, original), {"_original_class": original}
    )


def _blank(original: type) -> nn.Linear:
    made = _class_of(original)
    return made.__new__(made)


def converted(
    original: nn.Linear,
    base_dtype: torch.dtype | None,
    weight: nn.Parameter | None = None,
    **scales,
) -> nn.Linear:
    """Return a module that stands for `original`, which stays as it is.

    base_dtype: of the output; None: the input's. weight: in its place, with a bias of its own that
    shares the original's memory; None: all parameters, buffers and hooks are the original's own,
    and what is loaded or moved in one shows in the other. scales: of SCALES, tensors or None,
    float32.
    """
    if base_dtype is not None:
        check_base_dtype(base_dtype)
    module = _blank(type(original))
    module.__dict__.update(original.__dict__)
    if weight is not None:
        module.__dict__["_parameters"] = dict(original._parameters, weight=weight)
        if original.bias is not None:
            bias = nn.Parameter(original.bias.detach(), requires_grad=False)
            module._parameters["bias"] = bias
    module.base_dtype = base_dtype
    # Past a parameter of that name, which stays in the state_dict.
    module.__dict__.update(scales)
    return module
