"""Prompts in the API format, built node by node.

A reference is what the API calls a link: [node id, output index].
"""

import itertools
from dataclasses import dataclass

Ref = list
_nonces = itertools.count(1)


@dataclass(frozen=True)
class Family:
    """How a model family is sampled in the smallest way that still is its own."""

    latent_node: str
    latent_inputs: dict
    sampling_node: str
    shift: float
    text_width: int


FAMILIES = {
    "wan": Family(
        "EmptyHunyuanLatentVideo",
        {"width": 64, "height": 64, "length": 5, "batch_size": 1},
        "ModelSamplingSD3",
        8.0,
        4096,
    ),
    "qwen_image": Family(
        "EmptySD3LatentImage",
        {"width": 128, "height": 128, "batch_size": 1},
        "ModelSamplingAuraFlow",
        3.1,
        3584,
    ),
}


class Graph(dict):
    """A prompt under construction: node id to {class_type, inputs}."""

    def add(self, class_type: str, **inputs) -> Ref:
        """Append a node and return a reference to its first output."""
        node_id = str(len(self) + 1)
        self[node_id] = {"class_type": class_type, "inputs": inputs}
        return [node_id, 0]


def load(graph: Graph, name: str) -> Ref:
    """The stock loader."""
    return graph.add("UNETLoader", unet_name=name, weight_dtype="default")


def load_lowbit(
    graph: Graph, name: str, format_name: str, *, recipe: str = "auto", keep: str = "", **others
) -> Ref:
    """The pack's loader. others: its optional inputs."""
    options = {"format": format_name, "recipe": recipe, "keep": keep, **others}
    return graph.add("LowBitLoadDiffusionModel", model_name=name, **options)


def quantize(
    graph: Graph, model: Ref, format_name: str, *, recipe: str = "auto", keep: str = ""
) -> Ref:
    """The pack's quantizer of a loaded model."""
    options = {"format": format_name, "recipe": recipe, "keep": keep}
    return graph.add("LowBitQuantizeModel", model=model, **options)


def attention(graph: Graph, model: Ref, mode: str, **options) -> Ref:
    """The pack's attention, in all layers, blocks and steps unless `options` say otherwise."""
    inputs = {"layers": "all", "blocks": "", "start_percent": 0.0, "end_percent": 1.0}
    inputs |= {"guard": "first_call", **options}
    return graph.add("LowBitAttention", model=model, mode=mode, **inputs)


def lora(graph: Graph, model: Ref, name: str, strength: float) -> Ref:
    """The stock LoRA loader."""
    return graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)


def lora_lowbit(graph: Graph, model: Ref, name: str, strength: float, **options) -> Ref:
    """The pack's LoRA loader, in all steps unless `options` say otherwise."""
    inputs = {"start_percent": 0.0, "end_percent": 1.0, **options}
    return graph.add("LowBitLoraLoader", model=model, lora_name=name, strength=strength, **inputs)


def unload(graph: Graph, samples: Ref) -> Ref:
    """Move every model out of memory once `samples` exist, and pass them on."""
    return graph.add("LowBitTestUnload", samples=samples, nonce=next(_nonces))


def weight_hash(graph: Graph, model: Ref, after: Ref) -> str:
    """Show the hash of the model's stored bytes once `after` exists; return the node's id."""
    return graph.add("LowBitTestWeightHash", model=model, after=after, nonce=next(_nonces))[0]


def sample(
    graph: Graph,
    model: Ref,
    family: str,
    *,
    seed: int = 1,
    steps: int = 2,
    cfg: float = 1.0,
    start: Ref | None = None,
    image_tokens: int = 0,
    hidden: int = 0,
) -> Ref:
    """Sample a small latent and return a reference to it.

    The sampler really runs on every call: its conditioning carries a new nonce, so the server's
    cache holds no result for it. Loaders stay cached, as they do for a user.
    start: only orders the work; the latent whose noise is replaced, the family's empty one if None.
    image_tokens, hidden: of `LowBitTestConditioning`.
    """
    spec = FAMILIES[family]
    model = graph.add(spec.sampling_node, model=model, shift=spec.shift)
    positive, negative = (
        graph.add(
            "LowBitTestConditioning",
            length=16,
            width=spec.text_width,
            seed=text_seed,
            nonce=next(_nonces),
            image_tokens=image_tokens,
            hidden=hidden,
        )
        for text_seed in (11, 12)
    )
    return graph.add(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=start or graph.add(spec.latent_node, **spec.latent_inputs),
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )


def save(graph: Graph, samples: Ref) -> str:
    """Save a latent and return the node's id, for `Server.latent`."""
    return graph.add("SaveLatent", samples=samples, filename_prefix="test")[0]
