"""One session of ComfyUI without its server on a GPU; prints what it saw as JSON.

Run as a program: host_session.py MODE, MODE one of dynamic (the host's default memory management),
legacy, novram (legacy, weights streamed from the CPU for every layer).
"""

import functools
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACK = HERE.parent.parent
HOST = os.environ.get("COMFYUI_PATH", str(Path.home() / "ComfyUI"))


def start(mode: str, base: str):
    """Bring ComfyUI up as its main program does, without the server, and return our pack."""
    sys.path.insert(0, HOST)
    import comfy.cli_args

    comfy.cli_args.args.base_directory = base
    if mode == "novram":
        comfy.cli_args.args.novram = True
    import comfy_aimdo.control

    if mode == "dynamic":
        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    if mode == "dynamic":
        indexes = [(d.index, 0) for d in comfy.model_management.get_all_torch_devices()]
        assert comfy_aimdo.control.init_devices(indexes)
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    return load("lowbit_pack", PACK / "__init__.py", [str(PACK)])


def load(name: str, path: Path, locations=None):
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def difference(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def sample(model, frames: int = 5, text_dim: int = 4096):
    import comfy.sample
    import torch

    noise = torch.randn(1, 16, frames, 32, 32, generator=torch.Generator().manual_seed(0))
    embedding = torch.randn(1, 32, text_dim, generator=torch.Generator().manual_seed(1))
    cond = [[embedding, {}]]
    empty = torch.zeros_like(noise)
    return comfy.sample.sample(model, noise, 2, 1.0, "euler", "simple", cond, cond, empty, seed=0)


def session(mode: str, base: str) -> dict:
    pack = start(mode, base)
    checkpoints = load("checkpoints", HERE.parent / "checkpoints.py")
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch

    host = importlib.import_module("lowbit_pack.nodes.host")
    saving = importlib.import_module("lowbit_pack.nodes.host.saving")
    attention = importlib.import_module("lowbit_pack.nodes.attention").LowBitAttention()
    formats = importlib.import_module("lowbit_pack.quant.formats")
    assert pack.NODE_CLASS_MAPPINGS
    path = checkpoints.write_wan(Path(base) / "wan.safetensors", dim=1024, ffn=4096, layers=4)
    lora = comfy.utils.load_torch_file(
        str(checkpoints.write_lora(Path(base) / "lora.safetensors", path))
    )
    seen = {"mode": mode, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]

    with torch.inference_mode():
        plain = comfy.sd.load_diffusion_model(str(path))
        # The first run of a process differs from all later ones by rounding.
        sample(plain)
        want = sample(plain)
        moved = difference(sample(with_lora(plain)), want)
        seen["dynamic"] = plain.is_dynamic()
        seen["capability"] = torch.cuda.get_device_capability()
        seen["attention"] = {}
        for mode in ("auto", "sdpa", "cudnn", "flash", "lowbit_exact", "lowbit_int8"):
            # 1,280 tokens: long enough for auto to take cuDNN.
            (model,) = attention.set_attention(plain, mode, "self", "", 0.0, 1.0, "every_call")
            seen["attention"][mode] = difference(sample(model), want)
        seen["attention_plain_untouched"] = torch.equal(sample(plain), want)
        seen["formats"] = {}
        for name in formats.names():
            loaded = host.load_model(str(path), name, "auto")
            first = sample(loaded)
            quantized = host.quantize_model(plain, name)
            row = {"error": difference(first, want)}
            second = sample(quantized)
            row["between_nodes"] = difference(second, first)
            row["plain_untouched"] = torch.equal(sample(plain), want)
            row["lora_moves"] = difference(sample(with_lora(loaded)), first) / moved
            comfy.model_management.unload_all_models()
            row["same_after_unload"] = torch.equal(sample(loaded), first)
            saved = saving.save_model(quantized, "diffusion_models/t")
            again = host.load_model(saved, "as_stored", "auto")
            row["same_after_saving"] = torch.equal(sample(again), second)
            seen["formats"][name] = row
            del loaded, quantized, again
        makers = {
            "loaded": lambda name: host.load_model(str(path), name, "auto"),
            "quantized": lambda name: host.quantize_model(plain, name),
        }
        seen["compiled"] = {
            f"{name} {by}": compiled(make(name), sample)
            for name in ("int8_convrot", "fp8_e4m3", "nvfp4")
            for by, make in makers.items()
        }
        file = checkpoints.write_qwen_image(Path(base) / "qwen_image.safetensors")
        for name in ("int8_convrot", "fp8_e4m3"):
            model = host.load_model(str(file), name, "auto")
            chosen = ("lowbit_exact", "self", "", 0.0, 1.0, "off")
            (model,) = attention.set_attention(model, *chosen)
            step = functools.partial(sample, frames=1, text_dim=checkpoints.QWEN_TEXT_DIM)
            seen["compiled"][f"{name} qwen_image"] = compiled(model, step)
    return seen


def compiled(model, step) -> dict:
    """Return what the host's own node for torch.compile makes of a model that `step` samples."""
    import torch
    import torch._dynamo as dynamo
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    want = step(model)
    dynamo.reset()
    dynamo.utils.counters.clear()
    got = step(TorchCompileModel.execute(model, "inductor").result[0])
    return {
        "error": difference(got, want),
        "graphs": dynamo.utils.counters["stats"]["unique_graphs"],
        "breaks": dict(dynamo.utils.counters["graph_break"]),
        "untouched": torch.equal(step(model), want),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(sys.argv[1], folder)))
