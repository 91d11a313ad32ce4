"""The model object of WanVideoWrapper: what this pack reads of it, and how it gets one of its own.

That pack is neither imported nor changed. Its WANVIDEOMODEL is a `ModelPatcher` whose `model` holds
the transformer and, by key, what its sampler asks for: `sd` (the file's tensors, from which the
sampler loads the weights; None once LoRAs are merged into them), `base_dtype`, `quantization`. The
sampler works on that object itself, past object patches, so a clone gets another one.
Source: kijai/ComfyUI-WanVideoWrapper 1.4.6, nodes_model_loading.py, nodes_sampler.py.
"""

import copy
import sys
from collections.abc import Iterator

import torch

TRANSFORMER = "diffusion_model"
COMPILED = "_orig_mod"


def check(patcher) -> None:
    """Raise ValueError where `patcher` is no WANVIDEOMODEL, or set up in a way that cannot stay."""
    known = getattr(getattr(patcher, "model", None), "pipeline", None)
    if not isinstance(known, dict) or not hasattr(patcher.model, TRANSFORMER):
        raise ValueError("WanVideo: the model is not of WanVideoWrapper's WanVideo Model Loader")
    if known.get("fp8_matmul"):
        raise ValueError(
            f"WanVideo: the model was loaded with quantization {known.get('quantization')}, whose "
            "FP8 products are tied to its own layers. Choose one without _fast in the loader; "
            "Quantize WanVideo (LowBit) brings products in 8 bits of its own."
        )
    if known.get("auto_cpu_offload"):
        raise ValueError(
            "WanVideo: vram_management_args replaces the model's layers. "
            "Disconnect it from the loader; block_swap_args works."
        )
    if known.get("control_lora"):
        raise ValueError(
            "WanVideo: a control LoRA is merged and taken out again while sampling, which needs "
            "the plain weights. Disconnect it from the loader."
        )


def clone(patcher):
    """Return a clone of a WANVIDEOMODEL with a model of its own: new modules, the same tensors.

    Blocks that were compiled come back as they were before; the sampler compiles them again.
    """
    plain = patcher.model
    model = object.__new__(type(plain))
    model.__dict__ = {**plain.__dict__, "pipeline": dict(plain.pipeline)}
    model.__dict__["_modules"] = dict(plain._modules)
    setattr(model, TRANSFORMER, _copied(getattr(plain, TRANSFORMER)))
    made = patcher.clone(model_override=(model, ({}, {}, {}, set())))
    # LoRAs that came after torch.compile bear its names.
    made.patches = {name.replace(f"{COMPILED}.", ""): p for name, p in made.patches.items()}
    # The model's size is another; asked for, it is counted again.
    made.size = 0
    return made


def _copied(transformer: torch.nn.Module) -> torch.nn.Module:
    """Return a deep copy of a module, but for its tensors, which share their memory."""
    known: dict[int, object] = {}
    for module in transformer.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if type(tensor) is torch.nn.Parameter:
                # Another Parameter on the same memory: `Module.to` moves Parameters in place.
                known[id(tensor)] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
            elif tensor is not None:
                known[id(tensor)] = tensor
    for module in transformer.modules():
        if COMPILED in module._modules:
            known[id(module)] = copy.deepcopy(module._modules[COMPILED], known)
    return copy.deepcopy(transformer, known)


def class_of_pack(patcher, module: str, name: str) -> type:
    """Return a class of the pack that made `patcher`, from a module of its own that is loaded.

    Raises ValueError where that pack has no such class.
    """
    package = type(patcher.model).__module__.rpartition(".")[0]
    found = getattr(sys.modules.get(f"{package}.{module}"), name, None)
    if found is None:
        raise ValueError(f"WanVideo: this version of WanVideoWrapper has no {module}.{name}")
    return found


def blocks(transformer: torch.nn.Module) -> Iterator[tuple[int, torch.nn.Module]]:
    """Yield (index, block) of the main stack, then of the VACE branch."""
    for stack in ("blocks", "vace_blocks"):
        yield from enumerate(getattr(transformer, stack, None) or ())


def replace(root: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put `module` in the place of the one called `name` below `root`."""
    parent, _, last = name.rpartition(".")
    root.get_submodule(parent)._modules[last] = module
