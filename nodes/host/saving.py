"""Saving a model of the host as one file, patches merged."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...quant.checkpoint import CheckpointWriter
from ...quant.checkpoint.writer import ENTRY_BYTES
from ...quant.record import RECORD_KEY, LayerRecord, encode
from .layers import ROOT, layer_records
from .work import progress

logger = logging.getLogger(__name__)


def save_model(patcher, prefix: str, prompt=None, extra_pnginfo: dict | None = None) -> str:
    """Write the diffusion model, patches merged, under the output folder and return the path."""
    import comfy.cli_args
    import comfy.model_management
    import folder_paths

    folder, name, counter, *_ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    path = os.path.join(folder, f"{name}_{counter:05}_.safetensors")
    metadata = {RECORD_KEY: encode(_records_as_saved(patcher))}
    if not comfy.cli_args.args.disable_metadata:
        metadata |= {k: json.dumps(v) for k, v in (extra_pnginfo or {}).items()}
        metadata |= {"prompt": json.dumps(prompt)} if prompt is not None else {}
    comfy.model_management.load_models_gpu([patcher])
    names = list(patcher.model.diffusion_model.state_dict())
    # The host's own naming of the parts of a checkpoint; it looks at names only.
    targets = patcher.model.model_config.process_unet_state_dict_for_saving({n: n for n in names})
    targets = {source: target for target, source in targets.items()}
    bar, tick = progress(len(names))
    room = {
        "names_bytes": sum(len(json.dumps(n)) + ENTRY_BYTES for n in targets.values()),
        "metadata_bytes": len(json.dumps(metadata)),
    }
    with CheckpointWriter(path, **room) as writer:
        for key, value in _patched_state(patcher):
            tick()
            writer.add(targets[key], value)
            bar.update(1)
        writer.finish(metadata)
    logger.info("LowBit saved %s", path)
    return path


def _patched_state(patcher) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the diffusion model of a loaded patcher, patches merged, one by one.

    The host's own `state_dict_for_saving` fails on integer payloads of layers that are not resident
    (it makes them Parameters that want gradients), and merges a patch twice where it keeps small
    layers resident.
    """
    state = patcher.model.diffusion_model.state_dict()
    merged: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        key = f"{ROOT}.{name}"
        if name in merged:
            yield name, merged.pop(name)
        elif key not in patcher.patches or _is_merged(patcher, key):
            yield name, value
        else:
            weight = patcher.patch_weight_to_device(key, patcher.load_device, return_weight=True)
            if isinstance(weight, QuantizedTensor):
                merged = weight.state_dict(name)
                weight = merged.pop(name)
            yield name, weight


def _is_merged(patcher, key: str) -> bool:
    """Return whether the host has put a patched weight in place; it then keeps the original."""
    return key in patcher.backup


def _records_as_saved(patcher) -> list[LayerRecord]:
    """Return the records without the errors of weights that patches change."""
    return [
        dataclasses.replace(r, error=None) if f"{ROOT}.{r.name}.weight" in patcher.patches else r
        for r in layer_records(patcher)
    ]
