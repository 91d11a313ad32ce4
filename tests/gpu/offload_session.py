"""Sampling with a model that does not fit, in ComfyUI on a GPU; prints what it saw as JSON.

Run as a program: offload_session.py MODE, MODE one of dynamic, legacy (of the host's memory
management). The GPU's memory is taken away until half of the model fits beside what a step needs.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent))
from host_session import HERE, difference, load, start

LAYERS, DIM, FFN = 8, 5120, 13824
# 81 frames at 480p: 32,760 tokens.
LATENT = (1, 16, 21, 60, 104)
TEXT = (1, 512, 4096)
STEPS = 3
# In the names of Triton's kernel and of that for Hopper.
KERNEL = "scaled_mm"
# What the allocator and the host need beside the activations: less than half a model.
SLACK_BYTES = 1 << 29


def sample(model):
    """Return STEPS of sampling without guidance."""
    import comfy.sample
    import torch

    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))
    embedding = torch.randn(TEXT, generator=torch.Generator().manual_seed(1))
    cond = [[embedding, {}]]
    empty = torch.zeros_like(noise)
    return comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", cond, cond, empty, seed=0
    )


def copied_bytes(seen) -> int:
    """Return the bytes that a profile saw come from the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(os.fspath(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sum(e["args"]["bytes"] for e in events if "Memcpy HtoD" in e.get("name", ""))


def timed(model) -> dict:
    """Return seconds of one sampling after one that warms up, its peak, products and result."""
    import torch

    # The first run differs from all later ones by rounding.
    sample(model)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    again = sample(model)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        sample(model)
        torch.cuda.synchronize()
    products = sum(e.count for e in seen.key_averages() if KERNEL in e.key)
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "products": products,
        "copied_bytes": copied_bytes(seen),
        "again": again,
    }


def session(mode: str, base: str) -> dict:
    start(mode, base)
    checkpoints = load("checkpoints", HERE.parent / "checkpoints.py")
    import comfy.model_management
    import torch

    host = importlib.import_module("lowbit_pack.nodes.host")
    attention = importlib.import_module("lowbit_pack.nodes.attention").LowBitAttention()
    plain = checkpoints.write_wan(Path(base) / "wan.safetensors", dim=DIM, ffn=FFN, layers=LAYERS)
    quantize_file = importlib.import_module("lowbit_pack.quant.quantize_file").quantize_file
    path = Path(base) / "wan_int8.safetensors"
    quantize_file(plain, path, "int8_convrot", device="cuda")
    with torch.inference_mode():
        model = host.load_model(str(path), "as_stored", "auto")
        defaults = {
            name: spec[1]["default"]
            for name, spec in attention.INPUT_TYPES()["required"].items()
            if "default" in spec[1]
        }
        (model,) = attention.set_attention(model, **defaults)
        model_bytes = model.model_size()
        resident = timed(model)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        needed = resident["peak_bytes"] - (0 if mode == "dynamic" else model_bytes)
        room = needed + model_bytes // 2 + SLACK_BYTES
        free = torch.cuda.mem_get_info()[0]
        ballast = torch.empty(free - room, dtype=torch.uint8, device="cuda")
        capped = timed(model)
        assert ballast.numel() == free - room
    error = difference(capped.pop("again"), resident.pop("again"))
    return {
        "mode": mode,
        "dynamic": model.is_dynamic(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model_bytes": model_bytes,
        "room_bytes": room,
        "steps": STEPS,
        # Of the model, what finds no room at the least.
        "absent_bytes": model_bytes - model_bytes // 2 - SLACK_BYTES,
        "resident": resident,
        "capped": capped,
        "difference": error,
        "ratio": capped["seconds"] / resident["seconds"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(sys.argv[1], folder)))
