"""Small Wans in ComfyUI without its server, compiled and counted; prints what it saw as JSON.

Run as a program by ComfyUI's Python: compile_session.py PACK HOST.
"""

import functools
import importlib
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
IMAGE_TOKENS = 257


def load(name: str, path: Path, locations=None):
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def start(pack: Path, host: str, base: str):
    """Bring ComfyUI up on the CPU as its main program does, without the server, and our pack."""
    sys.path.insert(0, host)
    sys.argv = sys.argv[:1]
    import comfy.cli_args

    args = comfy.cli_args.args
    args.base_directory, args.cpu, args.use_pytorch_cross_attention = base, True, True
    return load("lowbit_pack", pack / "__init__.py", [str(pack)])


def sample(model, image: bool = False, steps: int = 3, cfg: float = 1):
    import comfy.sample
    import torch

    noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 16, 4096, generator=torch.Generator().manual_seed(1))
    options = {}
    if image:
        seen = torch.randn(1, IMAGE_TOKENS, 1280, generator=torch.Generator().manual_seed(2))
        options["clip_vision_output"] = types.SimpleNamespace(penultimate_hidden_states=seen)
    cond, other = [[text, options]], [[text.flip(1), options]]
    arguments = (steps, cfg, "euler", "simple", cond, other, torch.zeros_like(noise))
    return comfy.sample.sample(model, noise, *arguments, seed=0)


def difference(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def compiled(model, attend, first: bool = False, **options) -> dict:
    """Return how a model with our attention compiles, and how its latent differs.

    first: it is compiled and sampled without our attention before.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    if first:
        sample(compile_model(model, counter))
        counter.frame_count = 0
    plain = sample(model)
    (ours,) = attend(model, **options)
    want = sample(ours)
    got = sample(compile_model(ours, counter))
    return {
        "difference": difference(got, want),
        "changed": difference(want, plain),
        "graphs": counter.frame_count,
    }


def compile_model(model, backend):
    """Return a clone as TorchCompileModel makes it, but that raises where the graph breaks."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    clone = model.clone(disable_dynamic=True)
    filters = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(clone, backend, options=filters, fullgraph=True)
    return clone


def layers_seen(model, attend) -> dict:
    """Return, by the node's layers, how many calls of one step our attention takes."""
    counts = {}
    key = "optimized_attention_override"
    for layers in ("self", "cross", "image_cross", "all"):
        (ours,) = attend(model, mode="sdpa", layers=layers)
        override, left = ours.model_options["transformer_options"][key], []

        def count(func, *args, override=override, left=left, **kwargs):
            def host(*args, **kwargs):
                left.append(1)
                return func(*args, **kwargs)

            left.append(0)
            return override(host, *args, **kwargs)

        ours.model_options["transformer_options"][key] = count
        sample(ours, image=True, steps=1)
        counts[layers] = left.count(0) - left.count(1)
    return counts


def loaded_again(path: str, node) -> dict:
    """Return what a clone does whose model the host loads again, from bf16, to compute in fp16.

    As it does for TorchCompileModel where dynamic memory management is on, which a CPU lacks.
    """
    import comfy.cli_args
    import comfy.memory_management
    import comfy.model_management
    import comfy.sd

    load_state, memory = comfy.sd.load_diffusion_model_state_dict, comfy.memory_management
    manual_cast = comfy.model_management.unet_manual_cast

    def lazily(*args, **options):
        memory.aimdo_enabled = True
        try:
            return load_state(*args, **options)
        finally:
            memory.aimdo_enabled = False

    comfy.cli_args.args.fp16_unet = True
    comfy.model_management.unet_manual_cast = lambda *args, **options: None
    try:
        model = comfy.sd.load_diffusion_model(path)
        (ours,) = node().quantize(model, "int8", "auto", "")
        want = sample(ours)
        comfy.sd.load_diffusion_model_state_dict = lazily
        again = ours.clone(force_deepcopy=True)
        layer = again.model.diffusion_model.time_embedding[0]
        return {
            "another model": again.model is not ours.model,
            "dtype": str(layer.weight.dtype),
            "difference": difference(sample(again), want),
        }
    finally:
        comfy.cli_args.args.fp16_unet = False
        comfy.model_management.unet_manual_cast = manual_cast
        comfy.sd.load_diffusion_model_state_dict = load_state


def session(pack: Path, host: str, base: str) -> dict:
    start(pack, host, base)
    checkpoints = load("checkpoints", HERE.parent / "checkpoints.py")
    import comfy.sd
    import torch

    node = importlib.import_module("lowbit_pack.nodes.attention").LowBitAttention
    inputs = node.INPUT_TYPES()["required"]
    defaults = {n: s["default"] for n, (_, s) in inputs.items() if "default" in s}

    def attend(model, **options):
        return node().set_attention(model, **{**defaults, **options})

    def wan(variant):
        path = checkpoints.write_wan(Path(base) / f"{variant}.safetensors", variant=variant)
        return comfy.sd.load_diffusion_model(str(path))

    seen = {}
    with torch.inference_mode():
        model = wan("t2v")
        run = functools.partial(compiled, model, attend, mode="lowbit_exact")
        seen["compiled"] = {
            "default": run(first=True),
            "every call checked": run(guard="every_call", layers="all", blocks="1"),
            "from a step on": run(start_percent=0.4),
            "rotated": run(rotation="hadamard"),
            "vace": compiled(wan("vace"), attend, mode="lowbit_exact"),
        }
        seen["layers"] = layers_seen(wan("i2v"), attend)
        path = checkpoints.write_wan(Path(base) / "again.safetensors")
        quantizer = importlib.import_module("lowbit_pack.nodes.quantize_model")
        seen["loaded again"] = loaded_again(str(path), quantizer.LowBitQuantizeModel)
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(Path(sys.argv[1]), sys.argv[2], folder)))
