"""Attention layers that are fused in ComfyUI without its server; prints what it saw as JSON.

Run as a program by ComfyUI's Python: fused_session.py PACK HOST.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compile_session
from compile_session import difference

STEPS = 2


def sample_image(model):
    import comfy.sample
    import torch

    noise = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 12, 3584, generator=torch.Generator().manual_seed(1))
    cond, empty = [[text, {}]], torch.zeros_like(noise)
    arguments = (STEPS, 1, "euler", "simple", cond, cond, empty)
    return comfy.sample.sample(model, noise, *arguments, seed=0)


def rotary_calls(sample, model) -> tuple:
    """Return the latent, and how often the host's rotary embedding was computed."""
    from comfy.ldm.qwen_image import model as qwen
    from comfy.ldm.wan import model as wan

    calls = []
    plain = wan.apply_rope1

    def counted(*args):
        calls.append(1)
        return plain(*args)

    wan.apply_rope1 = qwen.apply_rope1 = counted
    try:
        return sample(model), len(calls)
    finally:
        wan.apply_rope1 = qwen.apply_rope1 = plain


def first_layer(model):
    root = model.model.diffusion_model
    blocks = getattr(root, "blocks", None) or root.transformer_blocks
    return getattr(blocks[0], "self_attn", None) or blocks[0].attn


def seen_of(model, attend, sample, quantize) -> dict:
    fused_attention = importlib.import_module("lowbit_pack.nodes.fused_attention")
    plain = sample(model)
    (ours,) = attend(model)
    fused, calls = rotary_calls(sample, ours)
    inside = type(first_layer(ours)).__name__
    ours.unpatch_model()
    after = type(first_layer(ours)).__name__
    known, fused_attention.KNOWN = fused_attention.KNOWN, {}
    (apart_model,) = attend(model)
    apart, calls_apart = rotary_calls(sample, apart_model)
    fused_attention.KNOWN = known
    patched = attend(model)[0]
    patched.set_model_attn1_patch(_identity)
    with_patch, calls_with_patch = rotary_calls(sample, patched)
    (both,) = attend(quantize(model))
    also = quantize(attend(model)[0])
    return {
        "inside": inside,
        "after": after,
        "changed": difference(fused, plain),
        "against apart": difference(fused, apart),
        "apart": difference(apart, plain),
        "rotary": [calls, calls_apart, calls_with_patch],
        "with patch equals apart": bool((with_patch == apart).all()),
        "order of nodes": difference(sample(both), sample(also)),
        "rotary quantized": [rotary_calls(sample, m)[1] for m in (both, also)],
    }


def _identity(first, *args, **kwargs):
    """Return what came: Wan's patches get a dict of the result, Qwen-Image's q, k and v."""
    return first["x"] if isinstance(first, dict) else {}


def session(pack: Path, host: str, base: str) -> dict:
    compile_session.start(pack, host, base)
    here = Path(__file__).resolve().parent
    checkpoints = compile_session.load("checkpoints", here.parent / "checkpoints.py")
    import comfy.sd
    import torch

    nodes = sys.modules["lowbit_pack"].NODE_CLASS_MAPPINGS

    def defaults(name):
        inputs = nodes[name].INPUT_TYPES()["required"]
        return {n: s["default"] for n, (_, s) in inputs.items() if "default" in s}

    def attend(model):
        options = {**defaults("LowBitAttention"), "mode": "lowbit_exact"}
        return nodes["LowBitAttention"]().set_attention(model, **options)

    def quantize(model):
        node = nodes["LowBitQuantizeModel"]
        options = {**defaults("LowBitQuantizeModel"), "format": "int8"}
        return getattr(node(), node.FUNCTION)(model, **options)[0]

    seen = {}
    with torch.inference_mode():
        for name, write, sample in (
            ("wan", checkpoints.write_wan, lambda m: compile_session.sample(m, steps=STEPS)),
            ("qwen_image", checkpoints.write_qwen_image, sample_image),
        ):
            path = write(Path(base) / f"{name}.safetensors")
            model = comfy.sd.load_diffusion_model(str(path))
            seen[name] = seen_of(model, attend, sample, quantize)
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(Path(sys.argv[1]), sys.argv[2], folder)))
