"""The linear layers of a model in the host, as a patcher has them, and the records of them."""

from collections.abc import Iterator

import torch

from ...quant.record import LayerRecord
from .linear import format_of

ATTACHMENT = "lowbit_records"
ROOT = "diffusion_model"


def linears(patcher) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (name below the diffusion model, module) of every linear layer as `patcher` has it."""
    root = patcher.get_model_object(ROOT)
    for name, module in root.named_modules():
        module = patcher.get_model_object(f"{ROOT}.{name}") if name else module
        weight = getattr(module, "weight", None)
        if hasattr(module, "in_features") and weight is not None and weight.dim() == 2:
            yield name, module


def base_weight(patcher, name: str, module) -> torch.Tensor:
    """Return a module's weight without patches: the host keeps it aside while one is applied."""
    import comfy.utils

    backup = patcher.backup.get(f"{ROOT}.{name}.weight")
    if backup is not None and comfy.utils.get_attr(patcher.model, f"{ROOT}.{name}") is module:
        return backup.weight
    return module.weight


def layer_records(patcher) -> list[LayerRecord]:
    """Return a record of every linear layer, with errors where this pack measured them."""
    known = {r.name: r for r in patcher.attachments.get(ATTACHMENT, [])}
    return [
        known.get(name) or record(name, base_weight(patcher, name, module), format_of(module))
        for name, module in linears(patcher)
    ]


def record(name, weight, fmt, error=None, reason="") -> LayerRecord:
    """Return the record of a layer: `weight` in `fmt`, None for a dense one; its size as saved."""
    size = sum(t.nbytes for t in fmt.pack(weight).values()) if fmt else weight.nbytes
    return LayerRecord(name, fmt and fmt.name, tuple(weight.shape), size, error, reason)
