"""A quantized weight whose `.data` can be assigned to, as offloading does to move it.

torch's own `.data` of a tensor around tensors replaces the outside and leaves the values where they
were. What else takes such a tensor for plain memory is refused here instead of being lost: writing
into it, as merging a LoRA does, and reading it at its address, as safetensors does.
"""

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

# In place, and understood by comfy-kitchen.
WRITES = (torch.ops.aten.copy_.default,)

NO_MERGE = "A LoRA acts beside it and is not merged (fuse_lora): merge before quantizing, if at all"
UNMERGE = "what was merged into other layers until now, `unfuse_lora()` takes out again"


class Weight(QuantizedTensor):
    """A `QuantizedTensor` that moves, pins and refuses as a parameter of a module has to."""

    @property
    def data(self) -> "Weight":
        """The same values, in a tensor of their own."""
        return self._copy_with(clone_params=False)

    @data.setter
    def data(self, source: torch.Tensor) -> None:
        """Take the values of `source`, a tensor of the same kind, where they lie.

        Raises TypeError for any other tensor, RuntimeError where torch.compile or autograd holds
        this one.
        """
        same = isinstance(source, QuantizedTensor) and source._layout_cls == self._layout_cls
        if not same or source.shape != self.shape:
            raise TypeError(
                f"the data of a quantized weight {self._layout_cls} {list(self.shape)} is one such,"
                f" not {type(source).__name__} {list(source.shape)}. {NO_MERGE};"
                f" {UNMERGE}. Offload to memory, not to disk; cast with `.to`"
            )
        torch.utils.swap_tensors(self, parameter(source))

    def data_ptr(self) -> int:
        """Raise TypeError: no memory holds the weight as its dtype and shape say."""
        raise TypeError(
            "a quantized weight does not lie in memory as its dtype and shape say; "
            "lowbit.save_model writes it, and offloading is to memory, not to disk"
        )

    def pin_memory(self, *args) -> "Weight":
        """Return a copy in memory that a GPU reads without waiting; itself where it is there."""
        return self._with_each(lambda tensor: tensor.pin_memory(*args))

    def record_stream(self, stream) -> None:
        """Keep its memory until what `stream` has to do by now is done."""
        self._with_each(lambda tensor: tensor.record_stream(stream) or tensor)

    def _with_each(self, do) -> "Weight":
        """Return a weight of what `do` makes of each tensor of this one."""
        names, context = self.__tensor_flatten__()
        parts = {name: do(getattr(self, name)) for name in names}
        return self.__tensor_unflatten__(parts, context, None, None)

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride) -> "Weight":
        """Return the weight that `__tensor_flatten__` took apart, of this class, as torch wants."""
        return _weight(QuantizedTensor.__tensor_unflatten__(parts, context, size, stride))

    def _copy_with(self, qdata=None, params=None, clone_params: bool = True) -> "Weight":
        return _weight(super()._copy_with(qdata, params, clone_params))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        written = func._schema.is_mutable and args and isinstance(args[0], cls)
        if written and func not in WRITES:
            raise TypeError(
                f"{func} would write into a quantized weight, which is not possible. {NO_MERGE};"
                f" {UNMERGE}"
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


def parameter(weight: QuantizedTensor) -> nn.Parameter:
    """Return a parameter on the memory of a quantized weight, without gradients."""
    return nn.Parameter(_weight(weight), requires_grad=False)


def _weight(weight: QuantizedTensor) -> Weight:
    return Weight(weight._qdata, weight._layout_cls, weight._params)
