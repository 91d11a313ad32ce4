"""LoRAs beside a model's layers while it runs, without a need for ComfyUI.

For the time of one run of the model, each layer that has a LoRA is replaced in its parent by a view
of it: another class with the very same attributes, so that weights, hooks, and whatever the host
notes on a layer are those of the layer. A parameter that has a difference is replaced by the sum
where its module and all copies of that have it. Nothing is left behind.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

from ..ops.linear import LowRank, add_low_rank, linear_with_terms, rescale, scaled, stacked

# What the tensor cores take, and the widest loads.
RANK_MULTIPLE = 16
CPU = torch.device("cpu")
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Matrix(torch.nn.Module):
    """A matrix that is loaded and unloaded as any other parameter of a model, quantized or not."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        # With the strength at hand in its scales; its stored values are those of the weight.
        self.scaled: QuantizedTensor | None = None

    def _apply(self, fn: Callable, recurse: bool = True) -> torch.nn.Module:
        # torch's own writes into the parameter, which a quantized one does not take.
        weight = fn(self.weight)
        if weight.is_inference() and not torch.is_inference_mode_enabled():
            weight = weight.clone()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        # It would keep memory that the weight has left.
        self.scaled = None
        return self

    def __deepcopy__(self, memo: dict) -> "Matrix":
        # Without the host's notes, which are of the memory that this one lies in.
        return Matrix(self.weight.detach().clone())

    def on(self, x: torch.Tensor) -> torch.Tensor:
        """Return the matrix on the device of x and, unless quantized, in its dtype.

        A copy where it was left elsewhere, in memory of its own: the host's buffers for streaming
        hold the weights of two layers, and a term's are needed beside them.
        """
        return _moved(self.weight, x)


def _moved(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(weight, QuantizedTensor):
        return weight.to(x.device, x.dtype, non_blocking=True)
    # torch.compile does not know the layout of what `to` returns.
    return weight if weight.device == x.device else weight.to(x.device, non_blocking=True)


class Term(torch.nn.Module):
    """The LoRA of one layer.

    down: [G, K], or [R, C, *kernel] of a convolution. up: [N, R]. scales: alpha by rank, of each of
    the G rows. constants: 1 where a row stands for a bias, else 0. rows: of this layer; key: of
    `down`, where several layers share it (`ops.linear.LowRank`).
    """

    def __init__(
        self,
        down: Matrix,
        up: Matrix,
        scales: torch.Tensor,
        constants: torch.Tensor,
        rows: tuple[int, int] | None = None,
        key: object = None,
    ):
        super().__init__()
        self.down, self.up = down, up
        self.scales, self.constants = scales, constants
        self.rows, self.key = rows, key
        self._strength: float | None = None
        self._factor = self._shift = None

    def __deepcopy__(self, memo: dict) -> "Term":
        # Terms that share their first matrix are copied with one memo, and share its copy.
        down, up, key = copy.deepcopy((self.down, self.up, self.key), memo)
        return Term(down, up, self.scales, self.constants, self.rows, key)

    def prepare(self, strength: float, device: torch.device) -> None:
        """Let the term act with this strength on `device`.

        Before a compiled graph runs, for which the tensors are inputs: another strength is written
        into the same ones.
        """
        stale = self._factor is None or self._factor.device != device
        weight = self.down.weight
        if isinstance(weight, QuantizedTensor):
            stale |= self.down.scaled is None or self.down.scaled._qdata is not weight._qdata
        if not stale and strength == self._strength:
            return
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._set(strength, device, stale)
        self._strength = strength

    def _set(self, strength: float, device: torch.device, stale: bool) -> None:
        weight, factor, shift = self.down.weight, strength * self.scales, strength * self.constants
        quantized = isinstance(weight, QuantizedTensor)
        by_row = factor.to(weight._params.scale.device) if quantized else None
        if stale:
            self._factor, self._shift = factor.to(device), shift.to(device)
            self.down.scaled = scaled(weight, by_row) if quantized else None
            return
        self._factor.copy_(factor)
        self._shift.copy_(shift)
        if quantized:
            rescale(self.down.scaled, weight, by_row)

    def low_rank(self, x: torch.Tensor) -> LowRank:
        """Return the term for the input x, as it was prepared."""
        up, shift = self.up.on(x), self._shift.to(x.device)
        if self.down.scaled is not None:
            return LowRank(_moved(self.down.scaled, x), up, None, shift, self.rows, self.key)
        return LowRank(self.down.on(x), up, self._factor.to(x.device), shift, self.rows, self.key)


class Difference(torch.nn.Module):
    """What a LoRA adds to a whole parameter, as its file has it: of the parameter's shape."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = Matrix(value)
        self._strength: float | None = None
        self._factor: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "Difference":
        return Difference(self.value.weight.detach().clone())

    def prepare(self, strength: float, device: torch.device) -> None:
        """Let it act with this strength on `device`; another one is written into the same tensor.

        Before a compiled graph runs, for which the tensor is an input.
        """
        stale = self._factor is None or self._factor.device != device
        if not stale and strength == self._strength:
            return
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if stale:
                self._factor = torch.zeros((), device=device)
            self._factor.fill_(strength)
        self._strength = strength

    @property
    def device(self) -> torch.device:
        """Return where it was prepared to act."""
        return self._factor.device

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter with the difference added to it: a new tensor, summed in float32."""
        device = parameter.device
        value = self.value.weight.to(device, torch.float32)
        summed = torch.addcmul(parameter.float(), self._factor.to(device), value)
        return summed.to(parameter.dtype)


class Lora(torch.nn.Module):
    """One LoRA of a model: terms by layer, strength, and the part of the sampling it is meant for.

    differences: of whole parameters, by name. A module, as which the host manages their memory.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        strength: float,
        steps: tuple[float, float],
        differences: Mapping[str, Difference] | None = None,
    ):
        super().__init__()
        self.terms, self.differences = dict(terms), dict(differences or {})
        self.strength, self.steps = strength, steps
        # By no names: those of layers have dots, which a module's may not.
        self._parts = torch.nn.ModuleList([*self.terms.values(), *self.differences.values()])

    def __deepcopy__(self, memo: dict) -> "Lora":
        terms, differences = copy.deepcopy((self.terms, self.differences), memo)
        return Lora(terms, self.strength, self.steps, differences)


@dataclass(eq=False)
class Stack:
    """All LoRAs of a model, in the order of their nodes: of one model alone.

    now: the strength of each in the run at hand; those of strength 0 have no part in it. acting:
    whether each has, which is all that compiled layers read of it.
    """

    loras: tuple[Lora, ...]
    now: tuple[float, ...] = ()
    acting: tuple[bool, ...] = ()
    _views: dict[str, tuple[torch.nn.Module, torch.nn.Module]] = field(default_factory=dict)
    # Parameters with their differences, by name: in one place for graphs that are run again.
    _sums: dict[str, torch.nn.Parameter] = field(default_factory=dict)

    @contextlib.contextmanager
    def applied(
        self, root: torch.nn.Module, now: Sequence[float], device: torch.device = CPU
    ) -> Iterator[None]:
        """Let what is below `root` have its LoRAs, with these strengths, within the context.

        device: of the layers' inputs.
        """
        self.now, self.acting = tuple(now), tuple(strength != 0 for strength in now)
        acting = [lora for lora, acts in zip(self.loras, self.acting, strict=True) if acts]
        for lora, strength in zip(self.loras, now, strict=True):
            for part in (*lora.terms.values(), *lora.differences.values()) if strength else ():
                part.prepare(strength, device)
        with contextlib.ExitStack() as undo:
            for name in dict.fromkeys(name for lora in acting for name in lora.terms):
                parent, leaf = _place(root, name)
                _replace(undo, parent._modules, leaf, self._view(name, parent.get_submodule(leaf)))
            for name in dict.fromkeys(name for lora in acting for name in lora.differences):
                added = [lora.differences[name] for lora in acting if name in lora.differences]
                self._change(undo, name, *_place(root, name), added)
            yield

    def _change(
        self,
        undo: contextlib.ExitStack,
        name: str,
        module: torch.nn.Module,
        leaf: str,
        added: Sequence[Difference],
    ) -> None:
        """Let the parameter `leaf` of a module have differences, until `undo` takes them away.

        By the functions that the host lets its layers' parameters pass, where it has a list of
        them: it may keep copies of parameters, and takes none from the layer then. Copies of other
        modules share the dictionary of parameters.
        """
        functions = f"{leaf}_function"
        if hasattr(module, functions):
            _replace(undo, vars(module), functions, [*getattr(module, functions), *added])
            return
        members = module._parameters if leaf in module._parameters else module._buffers
        plain = members[leaf]
        # On the device of the run, in float32 to the end: rounded once.
        value = plain.to(added[0].device, torch.float32)
        for difference in added:
            value = difference(value)
        _replace(undo, members, leaf, self._sum(name, value.to(plain.dtype)))

    def _sum(self, name: str, value: torch.Tensor) -> torch.nn.Parameter:
        """Return `value` as the parameter that stands for `name` in every run."""
        known, kind = self._sums.get(name), (value.shape, value.dtype, value.device)
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if known is None or (known.shape, known.dtype, known.device) != kind:
                known = torch.nn.Parameter(torch.empty_like(value), requires_grad=False)
                self._sums[name] = known
            known.copy_(value)
        return known

    def _view(self, name: str, plain: torch.nn.Module) -> torch.nn.Module:
        """Return the view of a layer: the same one as long as the layer is."""
        known = self._views.get(name)
        if known is None or known[0] is not plain:
            terms = [
                (i, lora.terms[name]) for i, lora in enumerate(self.loras) if name in lora.terms
            ]
            known = self._views[name] = plain, _view_of(plain, self, terms)
        return known[1]


def _place(root: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Return (the module that holds `name`, its name there).

    What torch.compile wraps reads its parts from the module within, which is the one returned.
    """
    path, _, leaf = name.rpartition(".")
    parent = root.get_submodule(path)
    return getattr(parent, "_orig_mod", parent), leaf


def _replace(undo: contextlib.ExitStack, members: dict, name: str, value: object) -> None:
    """Put a value into a dictionary, until `undo` gives back what was there."""
    if name in members:
        undo.callback(members.__setitem__, name, members[name])
    else:
        undo.callback(members.pop, name, None)
    members[name] = value


class WithTerms:
    """Mixed into the class of a layer: adds the terms of its LoRAs."""

    __slots__ = ()

    def _call_impl(self, *args, **kwargs):
        """Return what the layer does, hooks included, plus its terms."""
        x = args[0] if args else kwargs["input"]
        terms = low_ranks_of(self, x)
        if not terms:
            return super()._call_impl(*args, **kwargs)
        object.__setattr__(self, "_pending", terms)
        try:
            out = super()._call_impl(*args, **kwargs)
            left = self._pending
        finally:
            object.__setattr__(self, "_pending", None)
        return add_terms(self, out, x, left) if left else out

    def _forward(self, *args, **kwargs):
        """Return the product as the host's layers call it, its terms in it where we compute it.

        Arguments: input, weight and bias, as they are multiplied.
        """
        terms = self._pending
        if terms is None or kwargs or not _takes(self, args[1]):
            return super()._forward(*args, **kwargs)
        object.__setattr__(self, "_pending", None)
        return linear_with_terms(*args, terms)


def _takes(module: torch.nn.Module, weight: torch.Tensor) -> bool:
    """Return whether `linear` multiplies a layer's weight with the layer's own input.

    weight: as the host has prepared it, in the layer's own layout if it is quantized still; that of
    one which it made in a compiled graph is not known there.
    """
    if not isinstance(weight, QuantizedTensor) or not isinstance(module.weight, QuantizedTensor):
        return False
    ours = hasattr(module.weight.layout_cls, "scheme")
    return ours and getattr(module, "pre_quant_scale", None) is None


def low_ranks_of(module: torch.nn.Module, x: torch.Tensor) -> list[LowRank]:
    """Return a layer's terms for the input x, those that act in this run."""
    if not isinstance(module, WithTerms):
        return []
    acting = module._stack.acting
    return [term.low_rank(x) for index, term in module._terms if acting[index]]


def add_terms(module, out: torch.Tensor, x: torch.Tensor, terms: Sequence[LowRank]) -> torch.Tensor:
    """Return out, a layer's result for x that may be written to, plus its terms.

    As one sum, but where torch.compile is at work on quantized matrices: it cannot join them.
    """
    add = add_low_rank if module.weight.dim() == 2 else functools.partial(_convolve, module)
    quantized = any(isinstance(term.down, QuantizedTensor) for term in terms)
    if not (quantized and torch.compiler.is_compiling()):
        terms = [_joined(terms)]
    for term in terms:
        out = add(out, x, term)
    return out


def _joined(terms: Sequence[LowRank]) -> LowRank:
    """Return the sum of terms, of linear layers or of convolutions."""
    if len(terms) == 1 or terms[0].down.dim() == 2:
        return stacked(terms)
    downs, factors, shifts = zip(*((t.down, t.factor, t.shift) for t in terms), strict=True)
    ups = torch.cat([t.up for t in terms], dim=1)
    return LowRank(torch.cat(downs), ups, torch.cat(factors), torch.cat(shifts))


def _convolve(module, out: torch.Tensor, x: torch.Tensor, term: LowRank) -> torch.Tensor:
    """Return out [B, N, …] plus the term of a convolution's input x [B, C, …]."""
    run = CONVOLUTIONS[term.down.dim()]
    geometry = (module.stride, module.padding, module.dilation)
    h = run(x, term.down.to(x.dtype), None, *geometry).transpose(1, -1)
    h = (h.float() * term.factor + term.shift).to(x.dtype)
    return out + F.linear(h, term.up.to(x.dtype)).transpose(1, -1).to(out.dtype)


def _view_of(plain: torch.nn.Module, stack: Stack, terms: Sequence[tuple[int, Term]]):
    view = object.__new__(_view_class(type(plain)))
    # The same dictionary, not a copy: the host moves weights, and notes on layers, at any time.
    object.__setattr__(view, "__dict__", plain.__dict__)
    for name, value in (("_stack", stack), ("_terms", terms), ("_pending", None)):
        object.__setattr__(view, name, value)
    return view


@functools.cache
def _view_class(kind: type) -> type:
    slots = {"__slots__": ("_pending", "_stack", "_terms")}
    return type(f"{kind.__name__}WithTerms", (WithTerms, kind), slots)


def padded(rank: int) -> int:
    """Return a rank as it is stored: a multiple of RANK_MULTIPLE."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
