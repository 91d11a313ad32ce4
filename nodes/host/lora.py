"""LoRAs as ComfyUI needs them, with the host's hands on their memory.

The matrices are a model of their own, which the host loads and unloads beside the diffusion model;
what it has no room for is copied as it is needed. A wrapper around each run of the diffusion model
lets its layers add their terms (`lora_terms.py`).
"""

import copy
import dataclasses
import logging
import weakref
from collections.abc import Collection, Iterator

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...quant import families, formats, lora
from ...quant.checkpoint import Checkpoint
from ...quant.memory import quantize_within_memory
from ..attention_override import is_within
from ..inputs import AS_STORED
from ..lora_terms import Difference, Lora, Matrix, Stack, Term, padded
from .layers import ROOT
from .linear import format_of
from .memory import make_room
from .quantizing import quantize_model
from .work import progress

logger = logging.getLogger(__name__)

KEY = "lowbit_lora"
ALL_STEPS = (0.0, 1.0)
# Rows of `down` have a scale each here, so that strengths are a matter of scales.
BY_ROW = {"fp8_e4m3": "fp8_e4m3_rowwise", "fp8_e5m2": "fp8_e4m3_rowwise"}
IN_8_BITS = (*BY_ROW, "fp8_e4m3_rowwise", "int8", "int8_convrot")
# Dimensions of the weights of linear layers and of convolutions.
PRODUCTS = (2, 3, 4, 5)
# The layout of the host's whose layers it may run without calling them.
UNCALLED = "TensorWiseINT8Layout"


@dataclasses.dataclass(frozen=True)
class Applied:
    """A LoRA that a model has: where from, how strongly and when, for `merged`."""

    path: str
    strength: float
    steps: tuple[float, float]


def set_lora(patcher, path: str, strength: float, steps: tuple[float, float]):
    """Return a clone of `patcher` with the LoRA at `path` beside its weights.

    steps: first and last part of the sampling, 0 to 1. Where they are all of it, differences of
    norms, and of biases whose layer has no LoRA, become patches of the host's, which know no steps.
    Raises LoraError for files that cannot be used, ValueError for steps that end before they start.
    """
    start, end = steps
    if not 0 <= start <= end <= 1:
        raise ValueError(f"steps from {start} to {end}: start to end within 0 and 1 is wanted")
    is_part = steps != ALL_STEPS
    source = _Source(patcher, path, is_part)
    if any(_is_uncalled(source.modules[name]) for name in (*source.parsed.pairs, *source.lone)):
        patcher = quantize_model(patcher, AS_STORED)
        source = _Source(patcher, path, is_part)
    source.warn_of_what_is_left_out()
    terms = _terms(source, patcher)
    differences = {name: Difference(value) for name, value in source.differences().items()}
    clone = patcher.clone()
    _add_patches(clone, source, strength)
    _add_lora(clone, Lora(terms, strength, steps, differences))
    known = clone.get_attachment(KEY) or ()
    clone.set_attachments(KEY, (*known, Applied(path, strength, steps)))
    clone.remove_wrappers_with_key(_wrapper_type(), KEY)
    clone.add_wrapper_with_key(_wrapper_type(), KEY, Runner(_loras(clone)).run)
    return clone


def _loras(patcher) -> tuple[Lora, ...]:
    """Return the LoRAs of a model, in the order of their nodes."""
    return tuple(each.model for each in patcher.get_additional_models_with_key(KEY))


def _wrapper_type() -> str:
    from comfy.patcher_extension import WrappersMP

    return WrappersMP.APPLY_MODEL


@dataclasses.dataclass(eq=False)
class Runner:
    """Runs models with their LoRAs, each within its steps.

    The host has one for all clones of a patcher. Some have a model of their own, for torch.compile
    or on another GPU; those on several GPUs run side by side, with copies of the LoRAs.
    loras: of a model that runs without its patcher.
    """

    loras: tuple[Lora, ...]
    # By model, and gone with it: they hold its layers.
    _stacks: weakref.WeakKeyDictionary = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary
    )

    def run(
        self,
        executor,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options=None,
        **kwargs,
    ):
        """Run the model once; the arguments are those of the host's `BaseModel.apply_model`."""
        options = transformer_options or {}
        model, sigmas = executor.class_obj, options.get("sigmas")
        stack = self._stack(model)
        meant = [is_within(one.steps, model.model_sampling, sigmas) for one in stack.loras]
        now = [one.strength * within for one, within in zip(stack.loras, meant, strict=True)]
        with stack.applied(model.diffusion_model, now, x.device):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _stack(self, model) -> Stack:
        """Return the stack of a model: the same one as long as its LoRAs are."""
        patcher = model.current_patcher
        loras = self.loras if patcher is None else _loras(patcher)
        known = self._stacks.get(model)
        if known is None or known.loras != loras:
            known = self._stacks[model] = Stack(loras)
        return known


class _Source:
    """A LoRA file, read as one for the model of a patcher.

    is_part: it is meant for a part of the sampling, so that nothing of it is left to the host.
    lone: then, the layers that have the difference of a bias and no LoRA: terms of rank 0.
    """

    def __init__(self, patcher, path: str, is_part: bool = False):
        root = patcher.get_model_object(ROOT)
        self.path, self.checkpoint = path, Checkpoint(path)
        state = {name: tuple(value.shape) for name, value in root.state_dict().items()}
        self.family = families.recognise(state).family
        self.modules = {
            name: patcher.get_model_object(f"{ROOT}.{name}")
            for name, module in root.named_modules()
            if getattr(module, "weight", None) is not None
        }
        bare = {name for name in state if name.rpartition(".")[0] not in self.modules}
        weights = {f"{n}.weight": tuple(m.weight.shape) for n, m in self.modules.items()}
        self.shapes = {**state, **weights}
        names = _aliases(patcher)
        parsed = lora.parse(self.checkpoint, {*self.modules, *bare}, self.family, *names)
        self.parsed, self.misfits = lora.fitting(self.checkpoint, parsed, self.shapes)
        self._refuse_what_is_no_sum()
        self.is_part = is_part
        alone = [name for name in self.parsed.biases if name not in self.parsed.pairs]
        self.lone = tuple(name for name in alone if is_part and self._is_product(name))

    def warn_of_what_is_left_out(self) -> None:
        """Log what fits no layer of the model, and what is of another shape than there."""
        if unknown := self.parsed.unknown:
            text = "%s: %d tensors fit no layer of this model and are left out, %s first"
            logger.warning(text, self.path, len(unknown), unknown[0])
        if self.misfits:
            text = "%s: left out, as this model has them in other shapes or not at all: %s"
            logger.warning(text, self.path, ", ".join(self.misfits))

    def _refuse_what_is_no_sum(self) -> None:
        quantized = [n for n in self.parsed.diffs if _is_quantized(self.modules.get(n))]
        if quantized:
            raise lora.LoraError(
                f"{self.path}: it has the whole difference of {quantized[0]}, a quantized layer; "
                "use ComfyUI's own LoRA loader, which merges it"
            )
        for name in self.parsed.pairs:
            if not self._is_product(name):
                raise lora.LoraError(f"{self.path}: {name} is no linear layer or convolution")

    def _is_product(self, name: str) -> bool:
        module = self.modules.get(name)
        if module is None or module.weight.dim() not in PRODUCTS:
            return False
        return getattr(module, "groups", 1) == 1 and not hasattr(module, "num_embeddings")

    def layers(self) -> Iterator[tuple[str, lora.Layer]]:
        """Yield (layer, its LoRA)."""
        yield from lora.read(self.checkpoint, self.parsed, self.shapes)
        for place in self.lone:
            n, *inputs = self.shapes[f"{place}.weight"]
            bias = lora.read_finite(self.checkpoint, self.parsed.biases[place])
            yield place, lora.Layer(torch.zeros(0, *inputs), torch.zeros(n, 0), 1.0, bias)

    def differences(self) -> dict[str, torch.Tensor]:
        """Return what is to be added to parameters while the model runs, by their names.

        To those that are in no layer (modulation): patches of the host's for them are not applied
        when it loads a model. Where the LoRA is meant for a part of the sampling, to all.
        """
        found = {p: name for p, name in self.parsed.diffs.items() if p not in self.modules}
        return self._read(found | (self._of_layers() if self.is_part else {}))

    def patches(self) -> dict[str, torch.Tensor]:
        """Return what the host is to add to parameters when it loads the model, by their names."""
        return self._read({} if self.is_part else self._of_layers())

    def _of_layers(self) -> dict[str, str]:
        """Return the differences of norms and of biases alone: parameter -> name in the file."""
        diffs = self.parsed.diffs.items()
        found = {f"{place}.weight": name for place, name in diffs if place in self.modules}
        for place, name in self.parsed.biases.items():
            if place not in self.parsed.pairs and place not in self.lone:
                found[f"{place}.bias"] = name
        return found

    def _read(self, names: dict[str, str]) -> dict[str, torch.Tensor]:
        return {p: lora.read_finite(self.checkpoint, name) for p, name in names.items()}


def _is_uncalled(module) -> bool:
    return getattr(module.weight, "_layout_cls", None) == UNCALLED


def _is_quantized(module) -> bool:
    return module is not None and isinstance(module.weight, QuantizedTensor)


def _aliases(patcher) -> tuple[dict[str, str], dict[str, str]]:
    """Return (the host's own names in LoRA files for whole weights of this model, for parts of it).

    Both with the layer that they belong to: a part is of a weight that the model has fused.
    """
    import comfy.lora

    whole, parts = {}, {}
    prefix = f"{ROOT}."
    for name, target in comfy.lora.model_lora_keys_unet(patcher.model, {}).items():
        # With the rows of the part beside it.
        is_part = not isinstance(target, str)
        key = target[0] if is_part else target
        if key.startswith(prefix):
            place = key.removeprefix(prefix).removesuffix(".weight")
            (parts if is_part else whole)[name] = place
    return whole, parts


def _terms(source: _Source, patcher) -> dict[str, Term]:
    """Return the terms by layer."""
    layers = dict(source.layers())
    dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    bar, tick = progress(len(layers))
    terms = {}
    for group in _groups(layers, source):
        tick()
        members = [layers.pop(name) for name in group]
        down = _down(members, source.modules[group[0]], dtype, patcher.load_device)
        constants = torch.cat([_rows(m)[1] for m in members])
        scales = torch.cat([_rows(m)[0] for m in members])
        key, first = object() if len(group) > 1 else None, 0
        for name, member in zip(group, members, strict=True):
            rows = None if key is None else (first, first + _size(member))
            terms[name] = Term(down, _up(member, dtype), scales, constants, rows, key)
            first += _size(member)
        bar.update(len(group))
    return terms


def _groups(layers: Collection[str], source: _Source) -> Iterator[list[str]]:
    """Yield the layers, those together that read one tensor and are of one kind."""
    rest = dict.fromkeys(layers)
    for ends in source.family.shared_inputs:
        for name in [n for n in rest if n.endswith(f".{ends[0]}")]:
            block = name.removesuffix(ends[0])
            group = [block + end for end in ends if block + end in rest]
            kinds = {_format_beside(source.modules[member]) for member in group}
            if len(group) > 1 and len(kinds) == 1:
                yield group
                for member in group:
                    del rest[member]
    yield from ([name] for name in rest)


def _size(member: lora.Layer) -> int:
    """Return the rows of a LoRA as they are stored: its rank, one for a bias, and padding."""
    return padded(member.down.shape[0] + (member.bias is not None))


def _rows(member: lora.Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, constants) of the rows of a LoRA: a bias is a row that is constant."""
    scales, constants = torch.zeros(2, _size(member))
    rank = member.down.shape[0]
    scales[:rank] = member.scale
    if member.bias is not None:
        constants[rank] = 1
    return scales, constants


def _down(members: list[lora.Layer], module, dtype: torch.dtype, device: torch.device) -> Matrix:
    """Return the first matrices of LoRAs below each other.

    In 8 bits where the layers that they stand beside multiply 8 bits by 8.
    """
    parts = []
    for member in members:
        part = member.down.new_zeros(_size(member), *member.down.shape[1:], dtype=dtype)
        part[: member.down.shape[0]] = member.down.to(dtype)
        parts.append(part)
    down = torch.cat(parts)
    name = _format_beside(module)
    if name is None:
        return Matrix(down)
    # Quantized on `device` if that has the memory.
    packed, *_ = quantize_within_memory(formats.get(name), down, device, make_room=make_room)
    return Matrix(packed.to(device=down.device))


def _format_beside(module) -> str | None:
    """Return the name of the format for a first matrix beside a layer, None for 16 bits.

    8 bits share the activation that our own arithmetic quantizes; elsewhere they gain nothing.
    """
    ours = hasattr(getattr(module.weight, "layout_cls", None), "scheme")
    fmt = format_of(module) if ours else None
    if fmt is None or fmt.name not in IN_8_BITS:
        return None
    return BY_ROW.get(fmt.name, fmt.name)


def _up(member: lora.Layer, dtype: torch.dtype) -> Matrix:
    """Return the second matrix of a LoRA."""
    rank = member.down.shape[0]
    up = torch.zeros(member.up.shape[0], _size(member), dtype=dtype)
    up[:, :rank] = member.up.to(dtype)
    if member.bias is not None:
        up[:, rank] = member.bias.to(dtype)
    return Matrix(up)


def _add_patches(clone, source: _Source, strength: float) -> None:
    """Give the host what it adds to parameters itself, strength included."""
    patches = {f"{ROOT}.{name}": ("diff", (value,)) for name, value in source.patches().items()}
    if patches and strength:
        clone.add_patches(patches, strength)


def _add_lora(clone, one: Lora) -> None:
    """Let the host manage the memory of a LoRA beside that of the model."""
    import comfy.model_patcher

    devices = (clone.load_device, clone.offload_device)
    patcher = comfy.model_patcher.CoreModelPatcher(one, *devices)
    # How the host makes another one, for a model on another GPU.
    patcher.cached_patcher_init = (_copied, (one, *devices))
    known = clone.get_additional_models_with_key(KEY)
    clone.set_additional_models(KEY, [*known, patcher])


def _copied(one: Lora, load_device, offload_device, disable_dynamic=False):
    """Return a patcher of a copy of a LoRA."""
    import comfy.model_patcher as patchers

    kind = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    return kind(copy.deepcopy(one).to(offload_device), load_device, offload_device)


def merged(patcher):
    """Return `patcher`, or a clone whose LoRAs are patches of the host's, as a file needs them.

    Raises LoraError when a LoRA is meant for a part of the sampling, which no file can hold.
    """
    from comfy.weight_adapter import LoRAAdapter

    applied = patcher.get_attachment(KEY)
    if not applied:
        return patcher
    clone = patcher.clone()
    clone.remove_wrappers_with_key(_wrapper_type(), KEY)
    clone.remove_additional_models(KEY)
    clone.remove_attachments(KEY)
    for one in applied:
        if one.steps != ALL_STEPS:
            raise lora.LoraError(
                f"{one.path}: a LoRA from {one.steps[0]} to {one.steps[1]} of the sampling cannot "
                "be merged into a file; save the model without it, or with all steps"
            )
        source, patches = _Source(patcher, one.path), {}
        for name, layer in source.layers():
            alpha = layer.scale * layer.down.shape[0]
            weights = (layer.up, layer.down, alpha, None, None, None)
            patches[f"{ROOT}.{name}.weight"] = LoRAAdapter(set(), weights)
            if layer.bias is not None:
                patches[f"{ROOT}.{name}.bias"] = ("diff", (layer.bias,))
        for name, value in source.differences().items():
            patches[f"{ROOT}.{name}"] = ("diff", (value,))
        clone.add_patches(patches, one.strength)
    return clone
