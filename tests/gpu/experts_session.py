"""Two experts with room for one, in ComfyUI on a GPU; prints what it saw as JSON.

Run as a program: experts_session.py MODE, MODE one of dynamic, legacy (of the host's memory
management). The GPU's memory is taken away until one expert and what a step needs are left room.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent))
from host_session import HERE, difference, load, start

LAYERS, DIM, FFN = 8, 5120, 13824
FORMAT = "int8_convrot"
# 17 frames at 480p: 7,800 tokens.
LATENT = (1, 16, 5, 60, 104)
TEXT = (1, 512, 4096)
# Of an expert's size, beside the expert: far from a second one.
SLACK = 0.4


def step(model, latent):
    """Return the latent after one step of sampling."""
    import comfy.sample
    import torch

    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))
    cond = [[torch.randn(TEXT, generator=torch.Generator().manual_seed(1)), {}]]
    return comfy.sample.sample(model, noise, 1, 1.0, "euler", "simple", cond, cond, latent, seed=0)


def in_turn(models) -> tuple:
    """Return the latent after a step of the first, the second and the first again, and the peak."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    latent = torch.zeros(LATENT)
    for model in (*models, models[0]):
        latent = step(model, latent)
    torch.cuda.synchronize()
    return latent, torch.cuda.max_memory_allocated()


def session(mode: str, base: str) -> dict:
    start(mode, base)
    checkpoints = load("checkpoints", HERE.parent / "checkpoints.py")
    import comfy.model_management
    import torch

    host = importlib.import_module("lowbit_pack.nodes.host")
    quantize_file = importlib.import_module("lowbit_pack.quant.quantize_file").quantize_file
    models = []
    with torch.inference_mode():
        for seed in (0, 1):
            plain = Path(base) / "plain.safetensors"
            checkpoints.write_wan(plain, dim=DIM, ffn=FFN, layers=LAYERS, seed=seed)
            path = Path(base) / f"expert{seed}.safetensors"
            quantize_file(plain, path, FORMAT, device="cuda")
            models.append(host.load_model(str(path), "as_stored", "auto"))
        model_bytes = models[0].model_size()
        # The first run differs from all later ones by rounding.
        in_turn(models)
        with_room, _ = in_turn(models)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        _, alone = in_turn(models[:1])
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        # Dynamic VRAM keeps weights outside torch's allocator.
        needed = alone + (model_bytes if mode == "dynamic" else 0)
        room = needed + int(SLACK * model_bytes)
        free = torch.cuda.mem_get_info()[0]
        ballast = torch.empty(free - room, dtype=torch.uint8, device="cuda")
        capped, _ = in_turn(models)
        assert ballast.numel() == free - room
    return {
        "mode": mode,
        "dynamic": models[0].is_dynamic(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model_bytes": model_bytes,
        "needed_bytes": needed,
        "room_bytes": room,
        "difference": difference(capped, with_room),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(sys.argv[1], folder)))
