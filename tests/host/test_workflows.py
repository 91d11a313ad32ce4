"""The shipped workflows against the host's real schemas, and sampled with small models."""

import copy

import pytest

from tests.host import graphs
from tests.workflows import shipped

# their options are the user's own files
FILE_INPUTS = {"model_name", "clip_name", "lora_name", "vae_name"}
# whatever comes before the text embeddings or after the latent needs files that tests do not have
NEEDS_FILES = {"CLIPLoader", "VAELoader", "VAEDecode", "SaveImage", "SaveAnimatedWEBP"}


def _family(name: str) -> str:
    return "qwen_image" if name.startswith("qwen") else "wan"


every_workflow = pytest.mark.parametrize("name", shipped.NAMES)
# Qwen-Image has no small model: its 761 MB take a quarter of a minute
sampled_workflows = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if _family(name) == "qwen_image" else name
        for name in shipped.NAMES
    ],
)


@pytest.fixture(scope="module")
def schemas(comfy):
    return comfy.object_info()


def _options(kind, settings) -> list | None:
    if isinstance(kind, list):
        return kind
    return settings[0].get("options") if kind == "COMBO" and settings else None


@every_workflow
def test_inputs_are_those_of_the_schemas(schemas, name):
    for key, node in shipped.api(name).items():
        schema = schemas[node["class_type"]]["input"]
        known = schema.get("required", {}) | schema.get("optional", {})
        given = node["inputs"]
        assert set(given) <= set(known), key
        assert set(schema.get("required", {})) <= set(given), key
        for input_name, value in given.items():
            kind, *settings = known[input_name]
            options = _options(kind, settings)
            if options is not None and input_name not in FILE_INPUTS:
                assert value in options, (key, input_name)


@every_workflow
def test_widgets_come_in_the_order_of_the_schemas(schemas, name):
    for key, node in shipped.api(name).items():
        order = schemas[node["class_type"]]["input_order"]
        known = order.get("required", []) + order.get("optional", [])
        widgets = [n for n, value in node["inputs"].items() if not shipped.is_link(value)]
        assert widgets == sorted(widgets, key=known.index), key


@sampled_workflows
def test_samples_with_a_small_model(comfy, request, name):
    family = _family(name)
    spec = graphs.FAMILIES[family]
    graph = graphs.Graph()
    for key, node in copy.deepcopy(shipped.api(name)).items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in NEEDS_FILES:
            continue
        if kind == "CLIPTextEncode":
            node["class_type"] = "LowBitTestConditioning"
            inputs = {"length": 16, "width": spec.text_width, "seed": int(key), "nonce": 0}
        elif kind == spec.latent_node:
            inputs = spec.latent_inputs
        elif "model_name" in inputs:
            inputs["model_name"] = request.getfixturevalue(family)
        elif "lora_name" in inputs:
            inputs["lora_name"] = request.getfixturevalue(f"{family}_lora")
        elif kind == "KSampler":
            inputs["steps"] = 2
        graph[key] = {"class_type": node["class_type"], "inputs": inputs}
    last = [key for key, node in graph.items() if node["class_type"].startswith("KSampler")][-1]
    node_id = "save"
    graph[node_id] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [last, 0], "filename_prefix": "workflow"},
    }
    entry = comfy.run(graph)
    assert comfy.latent(entry, node_id).isfinite().all()
    preview = next(key for key, node in graph.items() if node["class_type"] == "PreviewAny")
    assert "int8_convrot" in comfy.text(entry, preview)
