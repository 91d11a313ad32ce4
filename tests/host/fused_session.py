"""Attention layers and blocks fused in ComfyUI without its server; prints what it saw as JSON.

Run as a program by ComfyUI's Python: fused_session.py PACK HOST.
"""

import dataclasses
import functools
import importlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compile_session
from compile_session import difference

STEPS = 1
LENGTHS = (12, 20, 28)
# Of the norms whose steps join the attention.
NORMS = {
    "wan": ("blocks.0.self_attn.norm_q", "blocks.1.self_attn.norm_k"),
    "qwen_image": ("transformer_blocks.0.attn.norm_q", "transformer_blocks.0.attn.norm_added_k"),
}


def sample_video(model, cfg: float = 1.0):
    return compile_session.sample(model, steps=STEPS, cfg=cfg)


def sample_image(model, cfg: float = 1.0, reference: bool = False, tokens: int = 12):
    """reference: of another size, at a time of its own. tokens: of text."""
    import comfy.sample
    import torch

    noise = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, tokens, 3584, generator=torch.Generator().manual_seed(1))
    options = {}
    if reference:
        latent = torch.randn(1, 16, 1, 4, 8, generator=torch.Generator().manual_seed(2))
        method = {"reference_latents_method": "index_timestep_zero"}
        options = {"reference_latents": [latent], **method}
    cond, other = [[text, options]], [[text.flip(1), options]]
    empty = torch.zeros_like(noise)
    arguments = (STEPS, cfg, "euler", "simple", cond, other, empty)
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
    fused = importlib.import_module("lowbit_pack.nodes.fused")
    plain = sample(model)
    ours = attend(model)
    joined, calls = rotary_calls(sample, ours)
    inside = type(first_layer(ours)).__name__
    ours.unpatch_model()
    after = type(first_layer(ours)).__name__
    known, fused.ATTENTION = fused.ATTENTION, {}
    apart_model = attend(model)
    apart, calls_apart = rotary_calls(sample, apart_model)
    fused.ATTENTION = known
    patched = attend(model)
    patched.set_model_attn1_patch(_identity)
    with_patch, calls_with_patch = rotary_calls(sample, patched)
    both = attend(quantize(model))
    also = quantize(attend(model))
    return {
        "inside": inside,
        "after": after,
        "changed": difference(joined, plain),
        "against apart": difference(joined, apart),
        "apart": difference(apart, plain),
        "rotary": [calls, calls_apart, calls_with_patch],
        "with patch equals apart": bool((with_patch == apart).all()),
        "order of nodes": difference(sample(both), sample(also)),
        "rotary quantized": [rotary_calls(sample, m)[1] for m in (both, also)],
    }


def strangers_of(model, attend, sample, quantize) -> dict:
    """Return what becomes of another node's patch of a `forward`, and of the plain model."""
    plain = sample(model)
    layer = first_layer(model)
    root = model.model.diffusion_model
    name = next(n for n, m in root.named_modules() if m is layer)
    key, seen = f"diffusion_model.{name}", {}

    def theirs(model):
        hits = []

        def forward(*args, **kwargs):
            hits.append(1)
            out = type(layer).forward(layer, *args, **kwargs)
            return tuple(1.5 * x for x in out) if isinstance(out, tuple) else 1.5 * out

        clone = model.clone()
        clone.add_object_patch(f"diffusion_model.{name}.forward", forward)
        return clone, hits

    alone, _ = theirs(model)
    want = sample(alone)
    seen["theirs changes"] = difference(want, plain)
    for order in ("theirs first", "ours first"):
        if order == "theirs first":
            patched, hits = theirs(model)
            both = quantize(attend(patched))
        else:
            both, hits = theirs(quantize(attend(model)))
        latent = sample(both)
        seen[order] = {"hits": len(hits), "difference": difference(latent, want)}
        # Made while the other branch is loaded, and sampled after it.
        ours = attend(model)
        hits.clear()
        seen[order]["ours beside"] = difference(sample(ours), plain)
        seen[order]["hits beside"] = len(hits)
        seen[order]["plain after"] = bool((sample(model) == plain).all())
        seen[order]["ours after"] = type(attend(model).object_patches.get(key)).__name__
    return seen


def compiled_lengths(model) -> dict:
    """Return how many graphs texts of other lengths take, one after the other, compiled whole."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, graphs, apart = CompileCounterWithBackend("eager"), [], []
    want = [sample_image(model, tokens=tokens) for tokens in LENGTHS]
    whole = compile_session.compile_model(model, counter)
    for tokens, latent in zip(LENGTHS, want, strict=True):
        apart.append(difference(sample_image(whole, tokens=tokens), latent))
        graphs.append(counter.frame_count)
    return {"graphs": graphs, "difference": max(apart)}


def lent_feed_forward(model, sample, quantize) -> str:
    """Return what a feed-forward becomes while another branch, which patches it, is loaded."""
    key = "diffusion_model.blocks.0.ffn"
    theirs = model.clone()
    ffn = theirs.get_model_object(key)
    theirs.add_object_patch(f"{key}.forward", lambda x: type(ffn).forward(ffn, x))
    sample(theirs)
    return type(quantize(model).object_patches.get(key)).__name__


def blocks_of(model, attend, sample, quantize, add_lora) -> dict:
    """Return how blocks of a quantized model differ from those of the host, and what they ran.

    With guidance, so that every batch has two items. The activation is quantized as on a GPU, where
    the layers' norm joins that.
    """
    import comfy.ops

    fused = importlib.import_module("lowbit_pack.nodes.fused")
    fusing = importlib.import_module("lowbit_pack.nodes.host.fusing")
    activation = importlib.import_module("lowbit_pack.ops.linear.activation")
    norm = comfy.ops.disable_weight_init.LayerNorm
    plain, kind, host = norm.forward, fusing.input_kind, fusing.HOST
    calls, apart_by = [], []

    def counted(module, *args, **options):
        # The norms that are modulated have no weight.
        calls.extend([1] * (module.weight is None))
        return plain(module, *args, **options)

    def compared(modules, given):
        outs = host.run_after(modules, given)
        before, y = len(calls), given.plain()
        del calls[before:]
        apart_by.extend(difference(out, m(y)) for out, m in zip(outs, modules, strict=True))
        return outs

    def run(model) -> tuple:
        calls.clear(), apart_by.clear()
        return sample(model, 3.0), len(calls)

    norm.forward = counted
    fusing.HOST = dataclasses.replace(host, run_after=compared)
    fusing.input_kind = lambda weight, device, rows: activation.kind_on(device, weight, rows)
    seen, latents = {}, {}
    try:
        for name, of_16_bits in (("quantized", "plain"), ("lora", "plain lora")):
            for way in (of_16_bits, "apart", "joined"):
                known = fused.BLOCKS if way == "joined" else {}
                fused.BLOCKS, kept = known, fused.BLOCKS
                ours = attend(model if way == of_16_bits else quantize(model))
                fused.BLOCKS = kept
                ours = add_lora(ours) if name == "lora" else ours
                latents[name, way], seen[f"{name}, {way}: norms"] = run(ours)
            seen[f"{name}: layers"] = max(apart_by)
            for way in ("apart", "joined"):
                got, want = latents[name, way], latents[name, of_16_bits]
                seen[f"{name}, {way}: error"] = difference(got, want)
        seen["lora changed"] = difference(latents["lora", "joined"], latents["quantized", "joined"])
    finally:
        norm.forward, fusing.input_kind, fusing.HOST = plain, kind, host
    return seen


def write_norms(path: Path, model, names: tuple[str, ...]) -> Path:
    """Write a LoRA of differences of norms alone, as large as their weights."""
    import torch
    from safetensors.torch import save_file

    root, generator = model.model.diffusion_model, torch.Generator().manual_seed(0)
    sizes = {name: root.get_submodule(name).weight.shape for name in names}
    values = {n: torch.randn(size, generator=generator) for n, size in sizes.items()}
    save_file({f"diffusion_model.{n}.diff": value for n, value in values.items()}, path)
    return path


def norms_of(model, attend, sample, add_norms) -> dict:
    """Return what differences of norms do where the norms join the attention.

    For all steps they are the host's, for a part of the sampling ours; here both act in the only
    step.
    """
    fused = importlib.import_module("lowbit_pack.nodes.fused")
    ours = attend(model)
    before, latents, calls = sample(ours), {}, {}
    for name, end in (("merged", 1.0), ("added", 0.5)):
        latents[name], calls[name] = rotary_calls(sample, add_norms(ours, end))
    known, fused.ATTENTION = fused.ATTENTION, {}
    apart, _ = rotary_calls(sample, add_norms(attend(model), 0.5))
    fused.ATTENTION = known
    return {
        "felt": difference(latents["added"], before),
        "against merged": difference(latents["added"], latents["merged"]),
        "against apart": difference(latents["added"], apart),
        "rotary": calls,
        "gone": bool((sample(ours) == before).all()),
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
    loras = Path(base) / "models" / "loras"
    loras.mkdir(parents=True)

    def node(name, model, **options):
        """Return the model that a node makes of one, with its default inputs and these."""
        inputs = nodes[name].INPUT_TYPES()["required"]
        specs = {n: spec[1] for n, spec in inputs.items() if len(spec) > 1}
        given = {n: spec["default"] for n, spec in specs.items() if "default" in spec}
        return getattr(nodes[name](), nodes[name].FUNCTION)(model, **{**given, **options})[0]

    def attend(model):
        return node("LowBitAttention", model, mode="lowbit_exact")

    def quantize(model):
        return node("LowBitQuantizeModel", model, format="int8")

    seen = {}
    with torch.inference_mode():
        for name, write, sample in (
            ("wan", checkpoints.write_wan, sample_video),
            ("qwen_image", checkpoints.write_qwen_image, sample_image),
        ):
            path = write(Path(base) / f"{name}.safetensors")
            model = comfy.sd.load_diffusion_model(str(path))
            seen[name] = seen_of(model, attend, sample, quantize)
            lora = checkpoints.write_lora(loras / f"{name}.safetensors", path)

            def add_lora(model, lora=lora):
                return node("LowBitLoraLoader", model, lora_name=lora.name)

            norms = write_norms(loras / f"{name}_norms.safetensors", model, NORMS[name])

            def add_norms(model, end, norms=norms):
                return node("LowBitLoraLoader", model, lora_name=norms.name, end_percent=end)

            seen[name]["norms"] = norms_of(model, attend, sample, add_norms)
            seen[name]["blocks"] = blocks_of(model, attend, sample, quantize, add_lora)
            seen[name]["strangers"] = strangers_of(model, attend, sample, quantize)
            if name == "qwen_image":
                edit = functools.partial(sample_image, reference=True)
                blocks = blocks_of(model, attend, edit, quantize, add_lora)
                seen["lengths"] = compiled_lengths(attend(quantize(model)))
                seen["qwen_edit"] = {
                    "blocks": blocks,
                    "felt": difference(edit(model), sample(model)),
                }
            else:
                seen["lent"] = lent_feed_forward(model, sample, quantize)
        path = checkpoints.write_wan(Path(base) / "vace.safetensors", variant="vace")
        model = comfy.sd.load_diffusion_model(str(path))
        lora = checkpoints.write_lora(loras / "vace.safetensors", path)

        def add_lora(model):
            return node("LowBitLoraLoader", model, lora_name="vace.safetensors")

        seen["wan_vace"] = {"blocks": blocks_of(model, attend, sample_video, quantize, add_lora)}
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(session(Path(sys.argv[1]), sys.argv[2], folder)))
