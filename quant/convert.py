"""Turning a checkpoint into a quantized one, a tensor at a time.

`plan` looks only at names and shapes and says what becomes of each tensor; `stream` reads,
quantizes and yields. The command line writes what it yields to a file, the loader node hands it to
the host.
"""

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from . import families, recipe
from .checkpoint import Checkpoint, CheckpointError, TensorInfo
from .checkpoint.foreign import AGAIN, Request
from .checkpoint.stored import (
    AS_IT_IS,
    FP8_DTYPES,
    INPUT_SCALES,
    LEGACY_FLAG,
    MARKER,
    METADATA_KEY,
    StoredLayer,
    check_integers,
    logical_shapes,
    marker_tensor,
    stored_layers,
)
from .finite import count_not_finite, not_finite
from .formats import Format, NotFiniteError
from .memory import empty_caches, quantize_within_memory
from .recipe import Choice, Recipe
from .record import RECORD_KEY, LayerRecord, encode

# What a dense weight becomes when the source holds it in FP8.
DENSE_DTYPE = torch.bfloat16
UNTOUCHED = Choice(None)
AS_STORED = "as_stored"
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8_DTYPES}


@dataclass(frozen=True)
class Step:
    """One thing to do: copy a tensor under a name, or write a layer. `layer` is the host's name.

    anew: round the layer again, though the source has it in the format chosen.
    """

    target: str
    source: str
    layer: str = ""
    choice: Choice = UNTOUCHED
    stored: StoredLayer | None = None
    shape: tuple[int, ...] = ()
    size_bytes: int = 0
    anew: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether the layer is written as the source has it, bit for bit."""
        same = self.stored and self.choice.format and self.stored.format is self.choice.format
        return bool(same) and not self.anew


@dataclass
class Plan:
    """What becomes of a checkpoint. `records` fills while `stream` runs.

    notes: what was found out about the layout of the source, and where memory ran out, in words.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    model: families.Recognised
    steps: list[Step]
    records: list[LayerRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[Step]:
        """The steps that quantize a layer."""
        return [s for s in self.steps if s.choice.format]

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the result: the source's, and a record of what was done."""
        metadata = {
            k: v for k, v in self.checkpoint.metadata.items() if k not in (METADATA_KEY, RECORD_KEY)
        }
        metadata[RECORD_KEY] = encode(
            self.records,
            format=AS_STORED if self.recipe.name == AS_STORED else self.recipe.format.name,
            recipe=self.recipe.name,
            family=self.model.family.name,
            variant=self.model.variant,
        )
        return metadata


def plan(
    checkpoint: Checkpoint,
    format_name: str,
    recipe_name: str = recipe.AUTO,
    keep: Iterable[str] = (),
) -> Plan:
    """Return what becomes of every tensor of `checkpoint`.

    Raises ValueError for an unknown format or recipe, CheckpointError when the markings of the
    source cannot be read or nothing in it would be quantized.
    """
    stored, shapes, model = _known(checkpoint, AS_IT_IS, notes := [])
    rules = recipe.build(format_name, recipe_name, keep, model)

    def choose(layer: str, quantized: StoredLayer | None, shape: tuple[int, ...]) -> Choice:
        return rules.choose(layer, shape)

    steps = list(_steps(checkpoint, stored, shapes, model, choose))
    result = Plan(checkpoint, rules, model, steps, notes=notes)
    if not result.layers:
        # Only weights of layers have a reason.
        choices = (step.choice for step in result.steps if step.choice.reason)
        why = recipe.nothing_to_quantize(format_name, recipe_name, choices)
        raise CheckpointError(f"{checkpoint.path}: {why}")
    return result


def plan_as_stored(checkpoint: Checkpoint, request: Request, format_name: str) -> Plan:
    """Return how `checkpoint` comes to the host's names, words and order, its numbers as they are.

    request: what the user says of the source. format_name: for layers whose numbers no format of
    ours holds; where it does not fit, another of 8 bits. Raises what `plan` raises, and
    CheckpointError when no layer is quantized.
    """
    stored, shapes, model = _known(checkpoint, request, notes := [])
    if not stored:
        raise CheckpointError(f"{checkpoint.path}: {_not_to_convert(checkpoint, format_name)}")
    rules = recipe.build(format_name, recipe.NONE, (), model)

    def choose(layer: str, quantized: StoredLayer | None, shape: tuple[int, ...]) -> Choice:
        if quantized is None:
            return Choice(None, "not quantized in the source")
        if quantized.format:
            return Choice(quantized.format, "as stored")
        return rules.requantize(shape, f"no format holds {quantized.title} numbers")

    steps = list(_steps(checkpoint, stored, shapes, model, choose))
    return Plan(checkpoint, dataclasses.replace(rules, name=AS_STORED), model, steps, notes=notes)


def _not_to_convert(checkpoint: Checkpoint, format_name: str) -> str:
    """Return why a file without quantized layers is not converted, and the command that does."""
    blocks = [info.encoding for info in checkpoint.values() if info.encoding]
    if not blocks:
        return "no layer of it is quantized; `lowbit quantize` does that"
    command = f"lowbit quantize {shlex.quote(checkpoint.path)} DST --format {format_name}"
    return (
        f"no format holds the numbers of GGUF's {blocks[0]} blocks, which have to be rounded "
        f"again; `lowbit quantize` does that: `{command}`"
    )


def _known(checkpoint: Checkpoint, request: Request, notes: list[str]):
    """Return (quantized layers, shapes by name, model); what was found out goes to `notes`."""
    stored = stored_layers(checkpoint, request, notes)
    shapes = logical_shapes(checkpoint, stored)
    model = families.recognise(shapes)
    refused = model.family.refused and model.family.refused(model.renamed.values())
    if refused:
        raise CheckpointError(f"{checkpoint.path}: {refused}")
    check_integers(checkpoint, stored, model)
    return stored, shapes, model


def _steps(checkpoint, stored, shapes, model, choose) -> Iterator[Step]:
    consumed = {t for layer in stored.values() for p, t in layer.parts.items() if p != "weight"}
    for name, info in checkpoint.items():
        module, _, part = name.rpartition(".")
        if name in consumed or part in (MARKER, LEGACY_FLAG):
            continue
        bare = model.renamed.get(name)
        # Tensors outside the diffusion model (a VAE, a text encoder) go over as they are.
        target = name if bare is None else model.host_prefix + bare
        quantized = stored.get(module) if part == "weight" else None
        if bare is None or part != "weight" or not _is_linear(info, quantized, shapes[name]):
            yield Step(target, name, stored=quantized, size_bytes=info.size_bytes)
            continue
        layer = bare.removesuffix(".weight")
        choice = choose(layer, quantized, shapes[name])
        yield Step(target, name, layer, choice, quantized, shapes[name], info.size_bytes)


def _is_linear(info: TensorInfo, stored: StoredLayer | None, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and (info.dtype in FLOATS or stored is not None)


def stream(
    plan: Plan,
    device: torch.device | str = "cpu",
    tick: Callable[[], None] = lambda: None,
    make_room: Callable[[], None] = empty_caches,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the result, in the order of the source, and fill `plan.records`.

    device: where layers are quantized; what is yielded lies on the CPU. tick: called often, also
    within a layer; may raise to stop. make_room: called when the device is out of memory, before
    the CPU takes the layer. Holds one layer at a time, and the source of the next.
    Raises NotFiniteError that names the layer when a weight holds NaN or Inf.
    """
    plan.records.clear()

    def quantize(fmt: Format, weight: torch.Tensor):
        return quantize_within_memory(fmt, weight, device, tick, make_room)

    # The next tensor is read while this one is quantized and written.
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(_read, plan.checkpoint, plan.steps[0])
        for step, following in zip(plan.steps, [*plan.steps[1:], None], strict=True):
            tick()
            source = ahead.result()
            if following:
                ahead = reader.submit(_read, plan.checkpoint, following)
            if step.choice.format:
                yield from _layer(plan, step, source, quantize)
            else:
                yield step.target, _kept(plan, step, source)


def _read(checkpoint: Checkpoint, step: Step) -> torch.Tensor | dict[str, torch.Tensor]:
    """Return what a step works on: a weight in its own values, or a layer's tensors to copy."""
    if step.is_copy:
        return _copied(checkpoint, step.stored)
    if step.stored:
        return step.stored.dequantize(checkpoint)
    tensor = checkpoint.read(step.source)
    return tensor.to(DENSE_DTYPE) if tensor.dtype in FP8_DTYPES else tensor


def _copied(checkpoint: Checkpoint, stored: StoredLayer) -> dict[str, torch.Tensor]:
    """Return a layer's tensors in the host's words. Raises NotFiniteError on NaN or Inf."""
    tensors = stored.tensors(checkpoint)
    weight = stored.unpack(checkpoint, tensors)
    packed = stored.format.pack(weight)
    extra = {part: tensors[part] for part in INPUT_SCALES if part in tensors}
    bad = dict(not_finite((packed | extra).items(), stored.format.scale_dtypes))
    # What lies in the padding of block scales is of no weight.
    if bad and (bad.keys() & extra.keys() or not weight.dequantize().isfinite().all()):
        part, count = next(iter(bad.items()))
        raise NotFiniteError(
            f"{checkpoint.path}: layer {stored.name}: {part} holds {count} NaN or Inf; the file or "
            f"its source is damaged: download it again, or {AGAIN}"
        )
    return packed | extra | {MARKER: marker_tensor(stored.marker)}


def _kept(plan: Plan, step: Step, source: torch.Tensor) -> torch.Tensor:
    unpacked = step.stored or plan.checkpoint[step.source].encoding
    tensor = source.to(DENSE_DTYPE) if unpacked else source
    if count := count_not_finite(tensor):
        plan.notes.append(f"{step.target} holds {count} NaN or Inf, which stay")
    if step.layer:
        size, reason = tensor.nbytes, step.choice.reason
        plan.records.append(LayerRecord(step.layer, None, step.shape, size, None, reason))
    return tensor


def _layer(plan: Plan, step: Step, source, quantize: Callable):
    if step.is_copy:
        tensors, error, reason = source, None, "as stored"
    else:
        tensors, error = _quantized(plan, step, source, quantize)
        reason = step.choice.reason
    size = sum(t.nbytes for t in tensors.values())
    name = step.choice.format.name
    plan.records.append(LayerRecord(step.layer, name, step.shape, size, error, reason))
    module = step.target.removesuffix(".weight")
    for part, tensor in tensors.items():
        yield f"{module}.{part}", tensor


def _quantized(plan: Plan, step: Step, weight: torch.Tensor, quantize: Callable):
    fmt = step.choice.format
    try:
        quantized, error, note = quantize(fmt, weight)
    except NotFiniteError as problem:
        raise NotFiniteError(f"{plan.checkpoint.path}: layer {step.layer}: {problem}") from problem
    if note and not any(note in known for known in plan.notes):
        plan.notes.append(f"{step.layer}, and perhaps others: {note}")
    tensors = {part: tensor.cpu() for part, tensor in fmt.pack(quantized).items()}
    return tensors | {MARKER: marker_tensor(fmt.marker)}, error
