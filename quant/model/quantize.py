"""`quantize_model`: the linear layers of any model in a number format, to be undone."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.linear import linear
from ...ops.linear.arithmetic import AUTO, with_arithmetic
from ...ops.linear.four_bit import GROUPS
from ...ops.linear.modules import LowBitLinear, converted, is_quantized
from ...ops.linear.weight import NO_MERGE, parameter
from .. import formats, fusion, recipe, report
from ..arithmetic import check as check_arithmetic
from ..checkpoint.stored import FP8_DTYPES
from ..convert import DENSE_DTYPE
from ..families.base import FeedForward
from ..formats import Format
from ..memory import quantize_within_memory
from ..recipe import nothing_to_quantize
from ..record import LayerRecord
from .attention import running_device
from .names import Names, is_fused, names_of
from .swap import Swap, place, places

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
# The attribute in which diffusers keeps who quantized a model.
GUARD = "hf_quantizer"
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Quantization:
    """What `quantize_model` did. It alone holds the original layers: dropping it frees them.

    records: one for each linear layer, by the model's own names. As a context manager it undoes
    itself at the end; `str` is the report.
    """

    def __init__(self, swap: Swap, records: list[LayerRecord], unguard: Callable[[], None]):
        self._swap = swap
        self._unguard = unguard
        self.records = records

    def undo(self) -> None:
        """Put the original layers back, bit for bit; a second call does nothing.

        Raises RuntimeError, before anything changes, when a layer was replaced again since.
        """
        self._swap.undo()
        self._unguard()

    def __enter__(self) -> "Quantization":
        return self

    def __exit__(self, *error) -> None:
        self.undo()

    def __str__(self) -> str:
        return report.table(self.records)


def quantize_model(
    model: nn.Module,
    format: str = "int8_convrot",
    recipe: str = recipe.AUTO,
    *,
    keep: Iterable[str] = (),
    arithmetic: str = AUTO,
    device: torch.device | str | None = None,
    progress: Progress = lambda done, total: None,
) -> Quantization:
    """Quantize the `nn.Linear` layers of `model` in place; return the report, which can undo it.

    format: a name of `formats.names()`. recipe: `auto` for the family that the model is of, a
    family's name, or `none`, which spares only what `keep` names. keep: regular expressions,
    searched in a layer's name, the model's own or the host's. arithmetic: in which nvfp4 and mxfp4
    weights are multiplied, one of `ops.linear.arithmetic.ARITHMETICS`. device: where layers are
    quantized; None: where they are; a layer for which the device has no memory is quantized on the
    CPU, and a warning says so. progress: called with (layers done, all layers) after each.
    Layers that read the same tensor quantize it once, and the GELU of a feed-forward is done while
    its result is quantized, as in the host. What exists of the model besides is not touched.
    Raises ValueError, before anything changes, for unknown names, for layers that are quantized
    already, have a `forward` assigned to them, hold NaN or lie on the meta device, and when nothing
    would be quantized; NoBackendError when the arithmetic cannot run where the model does, or would
    on a GPU that is there; torch.OutOfMemoryError that names the layer for which the model's device
    has no memory, and then nothing is changed.
    """
    names = names_of(model)
    lies = next(model.parameters()).device
    check_arithmetic(format, arithmetic, running_device(lies))
    rules = _rules(format, recipe, keep, names)
    layers = {spots[0].name: spots for spots in places(model, nn.Linear)}
    for name, spots in layers.items():
        _check(name, spots[0].module)
    records, made, choices = [], {}, []
    for name, spots in layers.items():
        original = spots[0].module
        choice = _choose(rules, name, names.layer(name), original.weight)
        choices.append(choice)
        if choice.format:
            weight, error = _quantized(name, original.weight, choice.format, device)
            weight = to_be_multiplied(weight, arithmetic, lies)
            records.append(_record(name, weight, choice.format, error, choice.reason))
            made[name] = stand_in(original, weight, records[-1])
        else:
            records.append(_record(name, original.weight, None, None, choice.reason))
        progress(len(records), len(layers))
    if not made:
        raise ValueError(nothing_to_quantize(format, recipe, choices))
    swap = Swap()
    for name, module in made.items():
        swap.put(layers[name], module)
    fuse(model, swap, names, made)
    logger.info("%d of %d linear layers quantized to %s", len(made), len(layers), format)
    return Quantization(swap, records, guard(model))


def to_be_multiplied(weight, arithmetic: str, device: torch.device | str):
    """Return a quantized `weight` with the wish for its arithmetic, if it has 4 bits.

    device: where its model lies. Raises NoBackendError where the wish cannot run.
    """
    if arithmetic == AUTO or weight.layout_cls.scheme not in GROUPS:
        return weight
    runs = running_device(device)
    check_arithmetic(formats.of(weight).name, arithmetic, runs)
    return with_arithmetic(weight, arithmetic, runs)


def _rules(format: str, name: str, keep: Iterable[str], names: Names) -> recipe.Recipe:
    if isinstance(keep, str):
        raise TypeError(f"keep is {keep!r}; a collection of regular expressions is wanted")
    return recipe.build(format, name, keep, names.recognised)


def _choose(rules: recipe.Recipe, name: str, host_name: str, weight) -> recipe.Choice:
    for pattern in rules.keep:
        if pattern.search(name):
            return recipe.Choice(None, f"kept as asked: {pattern.pattern}")
    if not weight.is_floating_point():
        return recipe.Choice(None, f"its weight is {weight.dtype}, packed by another library")
    return rules.choose(host_name, tuple(weight.shape))


def _check(name: str, module: nn.Linear) -> None:
    if isinstance(module, LowBitLinear) or is_quantized(module.weight):
        raise ValueError(f"{name} is quantized already; undo that first")
    if "forward" in vars(module):
        raise ValueError(
            f"{name} has a forward of its own assigned to it, as offloading does; quantize the "
            "model before"
        )
    if module.weight.is_meta:
        raise ValueError(f"{name}: its weight is on the meta device; load it before")


def _quantized(name: str, weight: torch.Tensor, fmt: Format, device):
    source = weight.detach()
    if source.dtype in FP8_DTYPES:
        source = source.to(DENSE_DTYPE)
    home = weight.device
    try:
        made, error, _ = quantize_within_memory(fmt, source, device or home, home=home)
    except torch.OutOfMemoryError as problem:
        raise torch.OutOfMemoryError(
            f"layer {name}: {home} has no memory for it beside the model as it was, which stays "
            f"until the end. Quantize the model on the CPU and move it then ({problem})"
        ) from problem
    except formats.NotFiniteError as problem:
        raise formats.NotFiniteError(f"layer {name}: {problem}") from problem
    return made, error


def _record(name, weight, fmt: Format | None, error=None, reason="") -> LayerRecord:
    size = sum(t.nbytes for t in fmt.pack(weight).values()) if fmt else weight.nbytes
    return LayerRecord(name, fmt and fmt.name, tuple(weight.shape), size, error, reason)


def stand_in(original: nn.Linear, weight, record: LayerRecord) -> nn.Linear:
    """Return a Linear with a quantized `weight` for `original`, which stays as it is."""
    module = converted(original, None, parameter(weight))
    for name in HOOKS:
        module.__dict__[name] = copy.copy(module.__dict__[name])
    module.record = record
    return module


def layer_records(model: nn.Module) -> list[LayerRecord]:
    """Return a record of every linear layer of `model`, by the model's own names."""
    records = []
    for spots in places(model, nn.Linear):
        module, name = spots[0].module, spots[0].name
        known = getattr(module, "record", None)
        if isinstance(module, LowBitLinear) and known and is_quantized(module.weight):
            records.append(dataclasses.replace(known, name=name))
        else:
            records.append(_record(name, module.weight, None))
    return records


class _NotSerializable:
    """What diffusers asks whether `save_pretrained` may write a model: it would lose the scales."""

    is_serializable = False
    quantization_config = SimpleNamespace(quant_method="LowBit, whose lowbit.save_model writes it")


def _refuse_merging(*arguments, **options):
    """Stand for a model's `fuse_lora`, which would merge into dense layers and then fail."""
    raise TypeError(f"the model is quantized, nothing was merged. {NO_MERGE}")


def guard(model: nn.Module) -> Callable[[], None]:
    """Make `save_pretrained` and `fuse_lora` of a diffusers model refuse; return what undoes this.

    Only the one model is changed: attributes of its own, plain ones, that its copies have too.
    """
    marks = {}
    if hasattr(model, "save_pretrained"):
        marks[GUARD] = _NotSerializable()
    if hasattr(model, "fuse_lora"):
        marks["fuse_lora"] = _refuse_merging
    before = {name: vars(model)[name] for name in marks if name in vars(model)}
    for name, mark in marks.items():
        setattr(model, name, mark)

    def undo():
        for name, mark in marks.items():
            if vars(model).get(name) is mark:
                delattr(model, name)
                if name in before:
                    setattr(model, name, before[name])

    return undo


def fuse(model: nn.Module, swap: Swap, names: Names, made: dict[str, nn.Module]) -> None:
    """Let quantized layers share inputs, and feed-forwards leave their GELU to the second one.

    made: by the model's names; what diffusers fused itself has its input for itself.
    """
    family = names.recognised.family
    own = {names.layer(name): name for name in made if not is_fused(name)}
    for group in fusion.readers({host: made[name] for host, name in own.items()}, family):
        for module in group:
            module.readers = len(group)
    for whole, record in fusion.feed_forwards(own, family):
        spot = place(model, whole)
        record = _in_model(names, record, whole)
        if record is None or any(m.p for m in spot.module.modules() if isinstance(m, nn.Dropout)):
            continue
        fused = fusion.fused(spot.module, record, _run_after_gelu)
        if fused is not spot.module:
            swap.put([spot], fused)


def _in_model(names: Names, record: FeedForward, whole: str) -> FeedForward | None:
    """Return `record` with the names of the model; a feed-forward is called alike in both."""
    to_model = {host: name for name, host in names.host.items()}
    parts = (to_model.get(f"{whole}.{part}.weight", "") for part in (record.first, record.second))
    first, second = (
        name.removeprefix(f"{whole}.").removesuffix(".weight") if name.startswith(whole) else None
        for name in parts
    )
    return FeedForward(record.name, first, second) if first and second else None


def _run_after_gelu(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return module(gelu(x)), in one pass where nobody else has a say in the layer."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if hooked or not isinstance(module, LowBitLinear) or not is_quantized(module.weight):
        return module(F.gelu(x, approximate="tanh"))
    return linear(x, module.weight, module.bias, input_act="gelu_tanh")
