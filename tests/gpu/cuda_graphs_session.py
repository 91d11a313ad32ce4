"""ComfyUI's TorchCompileModel with CUDA graphs on a GPU; prints what it saw as JSON.

Run as a program: cuda_graphs_session.py MODE [BACKEND], MODE of `host_session.py`. BACKEND: of
torch.compile, cudagraphs by default.
"""

import contextlib
import functools
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
DIM, LAYERS = 1024, 4
ALL, FIRST, SECOND = (0.0, 1.0), (0.0, 0.5), (0.5, 1.0)
# A model in 16 bits as the host loads it: what keeps CUDA graphs from it is none of ours.
PLAIN = "16 bits"
# Title -> (format, whether with our attention, strength and part of the sampling of each LoRA).
CASES = {
    "int8_convrot": ("int8_convrot", False, ()),
    "fp8_e4m3": ("fp8_e4m3", False, ()),
    "LoRA": ("int8_convrot", False, ((1.0, ALL),)),
    "LoRAs in halves, attention": ("int8_convrot", True, ((1.0, FIRST), (0.4, SECOND))),
}


def write_lora(path: Path, matrices: Path) -> Path:
    """Write a LoRA with matrices, and differences of parameters outside layers and of a norm."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    sizes = {f"blocks.{i}.diff_m": (1, 6, DIM) for i in range(LAYERS)}
    sizes |= {"head.modulation.diff": (1, 2, DIM), "blocks.0.self_attn.norm_k.diff": (DIM,)}
    values = {n: torch.randn(size, generator=generator) * 0.1 for n, size in sizes.items()}
    differences = {f"diffusion_model.{n}": value for n, value in values.items()}
    save_file({**load_file(matrices), **differences}, path)
    return path


@contextlib.contextmanager
def recordings() -> Iterator[list]:
    """Give a list that gets an item for each CUDA graph that torch.compile records."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    made, plain = [], CUDAGraphTreeManager.record_function

    @functools.wraps(plain)
    def counted(*args, **kwargs):
        made.append(1)
        return plain(*args, **kwargs)

    with mock.patch.object(CUDAGraphTreeManager, "record_function", counted):
        yield made


def case(make, plain, sample, backend: str) -> dict:
    """Return what becomes of a model that TorchCompileModel compiles.

    It is sampled three times before the model runs without: a graph's first call warms up, its
    second one is recorded. error: of the worst latent; again: how far they are from the first.
    recorded, skipped: graphs. plain: another model, which is to stay as it is.
    """
    import torch
    import torch._dynamo as dynamo
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from host_session import difference

    before, model = sample(plain), make()
    dynamo.reset()
    dynamo.utils.counters.clear()
    # Under dynamic memory management of a model of its own.
    whole = TorchCompileModel.execute(model, backend).result[0]
    try:
        with recordings() as recorded:
            latents = [sample(whole) for _ in range(3)]
    except RuntimeError as error:
        return {"raised": f"{type(error).__name__}: {error}"[:4000]}
    counters, want = dynamo.utils.counters, sample(model)
    return {
        "raised": None,
        "error": max(difference(latent, want) for latent in latents),
        "again": max(difference(latent, latents[0]) for latent in latents[1:]),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
        "recorded": len(recorded),
        "skipped": counters["inductor"]["cudagraph_skips"],
        "untouched": torch.equal(sample(model), want) and torch.equal(sample(plain), before),
        "moves": difference(want, before),
    }


def cases(path: Path, stock_path: Path, file: Path, sample, backend: str) -> dict:
    """Return `case` of PLAIN and all CASES.

    path, stock_path: of the checkpoint in BF16 and of the host's own model; file: of the LoRA.
    """
    import comfy.sd
    import torch
    import torch._dynamo as dynamo

    host = importlib.import_module("lowbit_pack.nodes.host")
    set_lora = importlib.import_module("lowbit_pack.nodes.host.lora").set_lora
    attention = importlib.import_module("lowbit_pack.nodes.attention").LowBitAttention()

    def make(name: str, attends: bool, loras: tuple):
        model = host.load_model(str(path), name, "auto")
        if attends:
            (model,) = attention.set_attention(model, "lowbit_exact", "all", "", 0.0, 1.0, "off")
        for strength, steps in loras:
            model = set_lora(model, str(file), strength, steps)
        return model

    rows = {}
    with torch.inference_mode():
        stock = comfy.sd.load_diffusion_model(str(stock_path))
        sample(stock)
        rows[PLAIN] = case(lambda: stock, stock, sample, backend)
        for title, (name, *rest) in CASES.items():
            plain = make(name, False, ())
            # The first run of a process differs from all later ones by rounding.
            sample(plain)
            rows[title] = case(functools.partial(make, name, *rest), plain, sample, backend)
    # The memory of the graphs with them.
    dynamo.reset()
    return rows


def session(mode: str, base: str, backend: str = "cudagraphs") -> dict:
    sys.path.insert(0, str(HERE))
    import host_session

    host_session.start(mode, base)
    import torch

    checkpoints = host_session.load("checkpoints", HERE.parent / "checkpoints.py")
    sizes = {"dim": DIM, "ffn": 4096, "layers": LAYERS}
    path = checkpoints.write_wan(Path(base) / "wan.safetensors", **sizes)
    # In the dtype that the host computes in: ComfyUI 0.33's dynamic VRAM fails to compile its own
    # BF16 weights ("mat1 and mat2 must have the same dtype, but got Half and BFloat16").
    stock = checkpoints.write_wan(Path(base) / "stock.safetensors", **sizes, dtype=torch.float16)
    matrices = checkpoints.write_lora(Path(base) / "matrices.safetensors", path)
    file = write_lora(Path(base) / "lora.safetensors", matrices)
    return cases(path, stock, file, host_session.sample, backend)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(sys.argv[1], folder, *sys.argv[2:])))
