"""LoRAs in ComfyUI without its server on a GPU; prints what it saw as JSON.

Run as a program: lora_session.py MODE, of `host_session.py`.
"""

import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FORMATS = ("bf16", "int8_convrot", "fp8_e4m3", "nvfp4")
DIM = 1024
# Without a single matrix: norms, a convolution, biases of layers that are quantized and not.
DIFFERENCES = {
    "diffusion_model.blocks.0.self_attn.norm_q.diff": (DIM,),
    "diffusion_model.blocks.1.norm3.diff": (DIM,),
    "diffusion_model.blocks.1.norm3.diff_b": (DIM,),
    "diffusion_model.patch_embedding.diff_b": (DIM,),
    "diffusion_model.blocks.0.self_attn.k.diff_b": (DIM,),
    "diffusion_model.blocks.1.ffn.2.diff_b": (DIM,),
    "diffusion_model.blocks.1.diff_m": (1, 6, DIM),
}


def write_differences(path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(s, generator=generator) * 0.3 for n, s in DIFFERENCES.items()}
    save_file(values, path)
    return path


def session(mode: str, base: str) -> dict:
    sys.path.insert(0, str(HERE))
    import host_session
    from host_session import difference, sample

    host_session.start(mode, base)
    checkpoints = host_session.load("checkpoints", HERE.parent / "checkpoints.py")
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch

    host = importlib.import_module("lowbit_pack.nodes.host")
    host_lora = importlib.import_module("lowbit_pack.nodes.host.lora")
    path = checkpoints.write_wan(Path(base) / "wan.safetensors", dim=DIM, ffn=4096, layers=4)
    lora = checkpoints.write_lora(Path(base) / "lora.safetensors", path, rank=24)
    tensors = comfy.utils.load_torch_file(str(lora))
    seen = {"mode": mode, "gpu": torch.cuda.get_device_name(), "formats": {}}

    differences = write_differences(Path(base) / "differences.safetensors")

    def whole(model, strength=1.0, steps=(0.0, 1.0), file=lora):
        return host_lora.set_lora(model, str(file), strength, steps)

    def differences_of(model, before) -> dict:
        """Return what a file of differences alone does, as a whole and in halves."""
        with_all = sample(whole(model, file=differences))
        first = whole(model, 1.0, (0.0, 0.5), differences)
        half = sample(first)
        return {
            "moves": difference(with_all, before),
            "half": difference(half, before),
            "rest": difference(half, with_all),
            "halves": difference(sample(whole(first, 1.0, (0.5, 1.0), differences)), with_all),
            "removed": torch.equal(sample(model), before),
        }

    with torch.inference_mode():
        plain = comfy.sd.load_diffusion_model(str(path))
        # The first run of a process differs from all later ones by rounding.
        sample(plain)
        seen["dynamic"] = plain.is_dynamic()
        want = sample(comfy.sd.load_lora_for_models(plain, None, tensors, 1.0, 0)[0])
        seen["moves"] = difference(want, sample(plain))
        for name in FORMATS:
            model = plain if name == "bf16" else host.load_model(str(path), name, "auto")
            before, with_lora = sample(model), whole(model)
            got = sample(with_lora)
            row = {"error": difference(got, want)}
            row["removed"] = torch.equal(sample(model), before)
            row["strength_0"] = torch.equal(sample(whole(model, 0.0)), before)
            halves = whole(whole(model, 1.0, (0.0, 0.5)), 1.0, (0.5, 1.0))
            row["halves"] = torch.equal(sample(halves), got)
            row["stacked"] = difference(sample(whole(whole(model, 0.5), 0.5)), got)
            row["differences"] = differences_of(model, before)
            (held,) = with_lora.get_additional_models_with_key(host_lora.KEY)
            sample(with_lora)
            row["size"], row["loaded"] = held.model_size(), held.loaded_size()
            row["managed"] = any(
                loaded.model is held or loaded.model.is_clone(held)
                for loaded in comfy.model_management.current_loaded_models
            )
            comfy.model_management.unload_all_models()
            row["unloaded"] = held.loaded_size()
            row["again"] = torch.equal(sample(with_lora), got)
            seen["formats"][name] = row
            del model, with_lora, halves, held
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(sys.argv[1], folder)))
