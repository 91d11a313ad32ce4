"""A quantized weight whose `.data` can be assigned to, as offloading does to move it.

torch's own `.data` of a tensor around tensors replaces the outside and leaves the values where they
were. What else takes such a tensor for plain memory is refused here instead of being lost: writing
into it or a view of it, as merging a LoRA does, reading it at its address, as safetensors does, and
sharing it.
"""

from collections.abc import Iterator

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

# In place, and understood by comfy-kitchen.
COPY = torch.ops.aten.copy_.default

NO_MERGE = "A LoRA acts beside it and is not merged (fuse_lora): merge before quantizing, if at all"
UNMERGE = "what was merged into other layers until now, `unfuse_lora()` takes out again"


class Weight(QuantizedTensor):
    """A `QuantizedTensor` that moves, pins and refuses as a parameter of a module has to."""

    @staticmethod
    def __new__(cls, qdata, layout_cls=None, params=None, requires_grad=None):
        """Raise TypeError for one tensor alone, of which accelerate makes parameters it moves."""
        if params is None:
            raise TypeError(
                "a quantized weight is not made of one tensor, as accelerate's cpu_offload makes it"
                " (enable_sequential_cpu_offload): use enable_group_offload or"
                " enable_model_cpu_offload"
            )
        return QuantizedTensor.__new__(cls, qdata, layout_cls, params)

    def __deepcopy__(self, memo: dict) -> "Weight":
        """Return a copy on memory of its own; a parameter, if this is one."""
        made = parameter(self.clone()) if isinstance(self, nn.Parameter) else self.clone()
        memo[id(self)] = made
        return made

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

    def share_memory_(self) -> "Weight":
        """Raise TypeError: torch would share memory that is not there."""
        raise TypeError("a quantized weight cannot be shared between processes; load it in each")

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
        _check_writes(func, args, kwargs or {})
        return _marked(func, super().__torch_dispatch__(func, types, args, kwargs))


class _Values(torch.Tensor):
    """What a view of a quantized weight shows: dequantized, so that what is written would be lost.

    Whatever else is computed of it is a plain tensor.
    """

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if any(kind is not cls for kind in types):
            return NotImplemented
        _check_writes(func, args, kwargs or {})
        with torch._C._DisableTorchDispatch():
            made = func(*args, **(kwargs or {}))
        return _marked(func, made)

    # torch refuses these to subclasses.

    def __repr__(self, *, tensor_contents=None) -> str:
        return repr(self.clone())

    def __format__(self, spec: str) -> str:
        return format(self.clone(), spec)

    def tolist(self) -> list:
        return self.clone().tolist()

    def numpy(self, *, force: bool = False):
        return self.clone().numpy(force=force)


def _check_writes(func, args: tuple, kwargs: dict) -> None:
    """Raise where `func` would write into a quantized weight or a view, wherever it is given.

    TypeError; ValueError for a copy into a weight of another shape.
    """
    for target in _written(func, args, kwargs):
        if func is COPY and isinstance(target, Weight):
            if args[1].shape != target.shape:
                raise ValueError(
                    f"a quantized weight {list(target.shape)} takes no values {list(args[1].shape)}"
                )
        elif isinstance(target, (Weight, _Values)):
            raise TypeError(
                f"{func} would write into a quantized weight, which is not possible. {NO_MERGE};"
                f" {UNMERGE}"
            )


def _written(func, args: tuple, kwargs: dict) -> Iterator:
    """Yield what `func` writes to by its schema: `out`, and each member of a list, too."""
    if not func._schema.is_mutable:
        return
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _marked(func, made):
    """Return what `func` made of a quantized weight; if a view of it, so that it refuses writes."""
    if func._schema.is_mutable or not any(r.alias_info for r in func._schema.returns):
        return made
    if isinstance(made, (list, tuple)):
        return type(made)(_marked(func, one) for one in made)
    if type(made) is QuantizedTensor:
        return _weight(made)
    # What torch.compile traces is of other types, and stays what it is.
    return made.as_subclass(_Values) if type(made) is torch.Tensor else made


def parameter(weight: QuantizedTensor) -> nn.Parameter:
    """Return a parameter on the memory of a quantized weight, without gradients."""
    return nn.Parameter(_weight(weight), requires_grad=False)


def _weight(weight: QuantizedTensor) -> Weight:
    return Weight(weight._qdata, weight._layout_cls, weight._params)
