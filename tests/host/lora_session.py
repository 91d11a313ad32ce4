"""LoRAs on clones that have a model of their own, in ComfyUI without its server; prints JSON.

Run as a program by ComfyUI's Python: lora_session.py PACK HOST.
"""

import gc
import importlib
import importlib.util
import json
import sys
import tempfile
import weakref
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
WHOLE, FIRST = (0.0, 1.0), (0.0, 0.4)
# Two prompts, one for each GPU.
CFG = 2.0


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_lora(checkpoints, folder: Path, model: Path) -> str:
    """Write a LoRA of all layers, with a difference of a modulation and one of a norm."""
    import torch
    from safetensors.torch import load_file, save_file

    path = checkpoints.write_lora(folder / "lora.safetensors", model)
    generator = torch.Generator().manual_seed(0)
    more = {
        "diffusion_model.blocks.1.diff_m": torch.randn(1, 6, 256, generator=generator) * 0.3,
        "diffusion_model.blocks.1.norm3.diff": torch.randn(256, generator=generator) * 0.3,
    }
    save_file({**load_file(path), **more}, path)
    return str(path)


def own_model(host, model, want) -> dict:
    """Return what a clone with a model of its own computes, compiled, and what is left of it."""
    import comfy.model_management
    from torch._dynamo.testing import CompileCounterWithBackend

    clone, counter = model.clone(force_deepcopy=True), CompileCounterWithBackend("eager")
    plain = host.difference(host.sample(clone), want)
    compiled = host.compile_model(clone, counter)
    seen = {
        "another model": clone.model is not model.model,
        "difference": plain,
        "compiled": host.difference(host.sample(compiled), want),
        "graphs": counter.frame_count,
    }
    again = model.clone(force_deepcopy=True)
    host.sample(again)
    left = [weakref.ref(again.model), weakref.ref(again.model.diffusion_model.blocks[0].ffn[0])]
    comfy.model_management.unload_all_models()
    del again
    gc.collect()
    comfy.model_management.cleanup_models()
    gc.collect()
    return {**seen, "left": sum(ref() is not None for ref in left)}


def two_gpus(host, lora, model, plain, file: str) -> dict:
    """Return what two GPUs compute side by side, for which two names of the CPU stand here."""
    import comfy.model_base
    import comfy.model_management
    import comfy.multigpu
    import torch

    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    find = mock.patch.object(
        comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices
    )
    # Prompts are not batched: a sum of two rounds otherwise.
    alone = mock.patch.object(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e30)
    with find, alone:
        want = host.sample(model, cfg=CFG)
        split = comfy.multigpu.create_multigpu_deepclones(model, 2)
        (clone,) = split.get_additional_models_with_key("multigpu")
        got = [host.sample(split, cfg=CFG) for _ in range(2)]
        later = lora.set_lora(split, file, -0.3, WHOLE)
        want_later = host.sample(lora.set_lora(model, file, -0.3, WHOLE), cfg=CFG)
        return {
            "another model": clone.model is not model.model,
            "felt": host.difference(want, host.sample(plain, cfg=CFG)),
            "difference": [host.difference(each, want) for each in got],
            "one added later": host.difference(host.sample(later, cfg=CFG), want_later),
            "felt later": host.difference(want_later, want),
            "without": host.difference(host.sample(model, cfg=CFG), want),
        }


def session(pack: Path, root: str, base: str) -> dict:
    host = load("compile_session", HERE / "compile_session.py")
    host.start(pack, root, base)
    checkpoints = load("checkpoints", HERE.parent / "checkpoints.py")
    import torch

    nodes = importlib.import_module("lowbit_pack.nodes.host")
    lora = importlib.import_module("lowbit_pack.nodes.host.lora")
    path = checkpoints.write_wan(Path(base) / "wan.safetensors")
    file = write_lora(checkpoints, Path(base), path)
    with torch.inference_mode():
        plain = nodes.load_model(str(path), "int8_convrot", "auto")
        model = lora.set_lora(plain, file, 1.0, WHOLE)
        want = host.sample(model)
        seen = {"own": own_model(host, model, want)}
        stacked = lora.set_lora(model, file, 0.5, FIRST)
        seen["two"] = two_gpus(host, lora, stacked, plain, file)
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(Path(sys.argv[1]), sys.argv[2], folder)))
