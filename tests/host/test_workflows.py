"""The shipped workflows against the host's real schemas, and sampled with small models."""

import copy

import pytest

from tests.host import graphs, schemata
from tests.workflows import shipped

# whatever comes before the text embeddings or after the latent needs files that tests do not have
NEEDS_FILES = {"CLIPLoader", "VAELoader", "VAEDecode", "SaveImage", "SaveAnimatedWEBP"}


def _family(name: str) -> str:
    return "qwen_image" if name.startswith("qwen") else "wan"


# test_wanvideo.py has the others
NAMES = [name for name in shipped.NAMES if not shipped.needs_wrapper(name)]
every_workflow = pytest.mark.parametrize("name", NAMES)
# Qwen-Image has no small model: its 761 MB take a quarter of a minute
sampled_workflows = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if _family(name) == "qwen_image" else name
        for name in NAMES
    ],
)


@pytest.fixture(scope="module")
def schemas(comfy):
    return comfy.object_info()


@every_workflow
def test_inputs_are_those_of_the_schemas_in_their_order(schemas, name):
    schemata.check_inputs(schemas, shipped.api(name))
    schemata.check_order(schemas, shipped.api(name))


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
