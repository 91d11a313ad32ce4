"""A session of ComfyUI on the CPU, without its server; prints what torch.compile made, as JSON.

Run as a program by ComfyUI's Python: compile_linear_session.py COMFYUI. Blocks are compiled by the
host's own helper, traced but not lowered: what is counted is graphs, breaks and compilations.
"""

import importlib
import importlib.util
import itertools
import json
import sys
import tempfile
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
LAYERS, STEPS = 3, 2
# (format, by the loader or the quantizer, mode of attention): one with each kind of product.
CASES = [
    ("int8_convrot", "load", "lowbit_exact"),
    ("fp8_e4m3", "load", "auto"),
    ("convrot_w4a4", "load", "auto"),
    ("nvfp4", "quantize", "lowbit_exact"),
]
# Parts of the sampling that hold all of its steps, and one of them: where a LoRA acts in a part,
# its norms and lone biases are added as the model runs, too.
ALL, SECOND = (0.0, 0.99), (0.5, 1.0)
DIM = 256
DIFFERENCES = {
    "diffusion_model.blocks.0.diff_m": (1, 6, DIM),
    "diffusion_model.blocks.1.diff_m": (1, 6, DIM),
    "diffusion_model.blocks.2.diff_m": (1, 6, DIM),
    "diffusion_model.head.modulation.diff": (1, 2, DIM),
    "diffusion_model.blocks.0.self_attn.norm_q.diff": (DIM,),
    "diffusion_model.blocks.1.norm3.diff": (DIM,),
    "diffusion_model.blocks.1.norm3.diff_b": (DIM,),
    "diffusion_model.blocks.2.ffn.2.diff_b": (DIM,),
}


def load(name: str, path: Path, locations=None):
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def start(host: str, base: str) -> None:
    """Bring ComfyUI up as `main.py --cpu` does, without the server."""
    sys.path.insert(0, host)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    comfy.cli_args.args.base_directory = base
    load("lowbit_pack", PACK / "__init__.py", [str(PACK)])


def sample(model):
    import comfy.sample
    import torch

    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    embedding = torch.randn(1, 32, 4096, generator=torch.Generator().manual_seed(1))
    cond, empty = [[embedding, {}]], torch.zeros_like(noise)
    return comfy.sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", cond, cond, empty, seed=0
    )


def compiled(model, want, keys) -> dict:
    """Return what sampling with `keys` of `model` compiled gives and counts."""
    import torch
    import torch._dynamo as dynamo
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    dynamo.reset()
    dynamo.utils.counters.clear()
    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="eager", keys=keys)
    same = torch.equal(sample(clone), want)
    counters = dynamo.utils.counters
    return {
        "same": same,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
    }


def write_differences(path: Path, matrices: Path) -> str:
    """Write a LoRA with the matrices of another, and with differences of whole parameters."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(s, generator=generator) * 0.1 for n, s in DIFFERENCES.items()}
    save_file({**load_file(matrices), **values}, path)
    return str(path)


def with_a_model_of_its_own(model, want) -> dict:
    """Return what a clone gives that got a model of its own, as the host makes for torch.compile.

    Dynamic memory management, without which the host does so for a second GPU alone, needs a GPU.
    """
    import torch

    make, arguments = model.cached_patcher_init
    fresh = make(*arguments, disable_dynamic=True)
    clone = model.clone(model_override=fresh.get_clone_model_override())
    result = {"same": torch.equal(sample(clone), want)}
    modules = (
        {id(m) for root in patcher.object_patches.values() for m in root.modules()}
        | {id(m) for m in patcher.model.modules()}
        for patcher in (model, clone)
    )
    first, second = modules
    result["shared_modules"] = len(first & second)
    return result


def session(host: str, base: str) -> dict:
    start(host, base)
    checkpoints = load("checkpoints", PACK / "tests" / "checkpoints.py")
    import comfy.sd
    import torch

    torch.set_num_threads(1)
    nodes = importlib.import_module("lowbit_pack.nodes.host")
    attention = importlib.import_module("lowbit_pack.nodes.attention").LowBitAttention()
    lora = importlib.import_module("lowbit_pack.nodes.host.lora")
    path = str(checkpoints.write_wan(Path(base) / "wan.safetensors", layers=LAYERS))
    blocks = [f"diffusion_model.blocks.{i}" for i in range(LAYERS)]
    seen = {}
    with torch.inference_mode():
        for name, by, mode in CASES:
            if by == "load":
                model = nodes.load_model(path, name, "auto")
            else:
                model = nodes.quantize_model(comfy.sd.load_diffusion_model(path), name)
            (model,) = attention.set_attention(model, mode, "all", "", 0.0, 1.0, "off")
            want = sample(model)
            row = seen[name] = compiled(model, want, blocks)
            row["own_model"] = with_a_model_of_its_own(model, want)
        seen["whole"] = compiled(model, want, ["diffusion_model"])
        plain = nodes.load_model(path, "int8_convrot", "auto")
        file = str(checkpoints.write_lora(Path(base) / "lora.safetensors", Path(path)))
        both = write_differences(Path(base) / "differences.safetensors", Path(file))

        def stacked(*loras):
            model = plain
            for each in loras:
                model = lora.set_lora(model, *each)
            (model,) = attention.set_attention(model, "lowbit_exact", "all", "", 0.0, 1.0, "off")
            return model

        whole, before = (0.0, 1.0), sample(plain)
        loras = {
            "lora": ((file, 1.0, whole), (file, 0.5, whole)),
            "differences": ((both, 1.0, ALL), (both, 0.5, whole)),
            "schedule": ((both, 1.0, ALL), (both, 0.5, SECOND)),
        }
        latents = [before]
        for name, each in loras.items():
            model = stacked(*each)
            want = sample(model)
            latents.append(want)
            for of, keys in (("", blocks), ("whole_", ["diffusion_model"])):
                seen[of + name] = compiled(model, want, keys)
        seen["felt"] = min(
            ((a - b).norm() / b.norm()).item() for a, b in itertools.combinations(latents, 2)
        )
        seen["same_without"] = torch.equal(sample(plain), before)
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(sys.argv[1], folder)))
