"""The conversions that wrappers know by name, for every `nn.Linear` of a model, and their undoing.

Modules are replaced in their parents; no `forward` is assigned to. Names and keys stay.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

from ..scaled_mm.check import FP8
from .fp8 import check_base_dtype, check_scale
from .modules import SCALES, LowBitLinear, converted
from .nvfp4 import quantize_weight

logger = logging.getLogger(__name__)


@dataclass
class _Layer:
    """A Linear, where it is held (several times where modules share it), and its scales."""

    original: nn.Linear
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    module: nn.Linear | None = None


class Conversion:
    """What a conversion replaced. It alone holds the originals: dropping it frees their weights."""

    def __init__(self, layers: list[_Layer]):
        self._layers = layers

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers that are converted, none once it is undone."""
        return tuple(layer.names[0] for layer in self._layers)

    def undo(self) -> None:
        """Put the original modules back, on the device of those that stood for them.

        A second call does nothing. Raises RuntimeError, before anything changes, when another
        module has taken the place of a converted one since.
        """
        for layer in self._layers:
            for (parent, attribute), name in zip(layer.places, layer.names, strict=True):
                if parent._modules.get(attribute) is not layer.module:
                    raise RuntimeError(
                        f"{name} was replaced again after its conversion; undo that first"
                    )
        for layer in self._layers:
            layer.original.train(layer.module.training)
            if layer.original.weight is not layer.module.weight:
                layer.original.to(layer.module.weight.device)
            for parent, attribute in layer.places:
                parent._modules[attribute] = layer.original
        self._layers = []


def convert_fp8_linear(
    module: nn.Module,
    base_dtype: torch.dtype,
    params_to_keep: Collection[str] = (),
    scale_weight_keys: Mapping[str, torch.Tensor] | None = None,
) -> Conversion:
    """Make every `nn.Linear` of `module` multiply in FP8 where its weight is FP8; to be undone.

    base_dtype: bf16, fp16 or fp32, of their outputs. params_to_keep: a layer stays as it is when
    its weight's name contains one of these. scale_weight_keys: from `NAME.scale_weight`, and
    `NAME.scale_input` where the file has one, to the tensor; an FP8 weight without a scale there
    or as its attribute has scale 1. Weights are not changed, nor copied; one that is not FP8 runs
    as before, and in FP8 once it is loaded as FP8.
    Raises TypeError or ValueError, before anything changes, when a layer is converted already, has
    a `forward` assigned to it, or a scale of a shape that does not fit; when `module` is a Linear
    itself; when scales are given and no layer has the name of any.
    """
    check_base_dtype(base_dtype)
    layers = list(_layers(module, params_to_keep, scale_weight_keys or {}))
    for layer in layers:
        layer.module = converted(layer.original, base_dtype, **layer.scales)
    return _replace(layers, "FP8")


def convert_fp4_linear(
    module: nn.Module,
    base_dtype: torch.dtype,
    params_to_keep: Collection[str] = (),
    scale_weight_keys: Mapping[str, torch.Tensor] | None = None,
) -> Conversion:
    """Quantize the weight of every `nn.Linear` of `module` to NVFP4; to be undone.

    Arguments and errors are those of `convert_fp8_linear`; scales are of weights that are FP8. The
    new weights are QuantizedTensors of dtype `base_dtype`: E2M1 packed two a byte, an E4M3 scale
    per 16 along K, a float32 scale per tensor. The originals stay in memory as long as what comes
    back does. Raises ValueError too when a weight holds NaN or Inf, is quantized or not loaded.
    """
    check_base_dtype(base_dtype)
    layers = list(_layers(module, params_to_keep, scale_weight_keys or {}))
    for layer in layers:
        weight = _nvfp4(layer, base_dtype)
        layer.module = converted(layer.original, base_dtype, weight, scale_weight=None)
    return _replace(layers, "NVFP4")


def _nvfp4(layer: _Layer, base_dtype: torch.dtype) -> nn.Parameter:
    name, weight = layer.names[0], layer.original.weight
    if isinstance(weight, QuantizedTensor) or not weight.is_floating_point():
        raise ValueError(f"{name}: its weight is quantized already; keep it with params_to_keep")
    if weight.is_meta:
        raise ValueError(f"{name}: its weight is on the meta device; load it before")
    scale = None
    if weight.dtype in FP8:
        scale = layer.scales.get("scale_weight", getattr(layer.original, "scale_weight", None))
    if scale is not None:
        scale = scale.to(weight.device, torch.float32).reshape(-1, 1)
    try:
        quantized = quantize_weight(weight.detach(), base_dtype, scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return nn.Parameter(quantized, requires_grad=False)


def _replace(layers: list[_Layer], kind: str) -> Conversion:
    for layer in layers:
        for parent, attribute in layer.places:
            parent._modules[attribute] = layer.module
    logger.info("%d linear layers converted to %s", len(layers), kind)
    return Conversion(layers)


def _layers(
    module: nn.Module, params_to_keep: Collection[str], scales: Mapping[str, torch.Tensor]
) -> Iterator[_Layer]:
    """Yield the layers of `module` to convert; raises as `convert_fp8_linear` says."""
    if isinstance(module, nn.Linear):
        raise ValueError(
            "the module is a Linear itself, which nothing holds: convert its parent, or call "
            "fp8_linear_forward"
        )
    if isinstance(params_to_keep, str):
        raise TypeError(f"params_to_keep is {params_to_keep!r}; a collection of strings is wanted")
    unknown = sorted(key for key in scales if key.rpartition(".")[2] not in SCALES)
    if unknown:
        raise ValueError(
            f"scale_weight_keys has {unknown[0]}; names that end in {', '.join(SCALES)} are known"
        )
    for key, scale in scales.items():
        if not isinstance(scale, torch.Tensor):
            raise TypeError(f"scale_weight_keys has {key} as {scale!r}; a tensor is wanted")
    found = _linears(module)
    names = {name for layer in found for name in layer.names}
    given = {key for key in scales if key.rpartition(".")[2] in SCALES}
    if given and not any(key.rpartition(".")[0] in names for key in given):
        raise ValueError(
            f"scale_weight_keys names {min(given)}, but no Linear of the module has such a name; "
            "is a prefix to be removed?"
        )
    for layer in found:
        if not any(part in f"{name}.weight" for part in params_to_keep for name in layer.names):
            _prepare(layer, scales)
            yield layer


def _linears(module: nn.Module) -> list[_Layer]:
    found: dict[int, _Layer] = {}
    for path, parent in module.named_modules():
        for attribute, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                layer = found.setdefault(id(child), _Layer(child))
                layer.places.append((parent, attribute))
                layer.names.append(f"{path}.{attribute}" if path else attribute)
    return list(found.values())


def _prepare(layer: _Layer, scales: Mapping[str, torch.Tensor]) -> None:
    """Check that a layer can be converted, and give it its scales."""
    name, original = layer.names[0], layer.original
    if isinstance(original, LowBitLinear):
        raise ValueError(f"{name} is converted already; undo that conversion first")
    if "forward" in original.__dict__:
        raise ValueError(f"{name} has a forward of its own assigned to it; undo that first")
    for kind, sizes in zip(SCALES, ((1, original.out_features), (1,)), strict=True):
        for scale in (scales[f"{n}.{kind}"] for n in layer.names if f"{n}.{kind}" in scales):
            check_scale(f"{name}.{kind}", scale, sizes)
            device = scale.device if original.weight.is_meta else original.weight.device
            layer.scales[kind] = scale.detach().to(device, torch.float32)
