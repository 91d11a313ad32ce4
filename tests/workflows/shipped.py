"""The shipped workflows: in the editor's format, and their twins in the API's."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
# twins lie a folder deeper: the host offers every .json beside the workflows as a template
API_FOLDER = FOLDER / "api"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))

# a host test checks that ComfyUI has them
STOCK_NODES = frozenset(
    {
        "CLIPLoader",
        "CLIPTextEncode",
        "EmptyHunyuanLatentVideo",
        "EmptySD3LatentImage",
        "KSampler",
        "KSamplerAdvanced",
        "ModelSamplingAuraFlow",
        "ModelSamplingSD3",
        "PreviewAny",
        "PreviewImage",
        "SaveAnimatedWEBP",
        "SaveImage",
        "VAEDecode",
        "VAELoader",
    }
)
# those of WanVideoWrapper begin so
WRAPPER = "WanVideo"


def editor(name: str) -> dict:
    """The workflow as the editor opens it."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def api(name: str) -> dict:
    """The same workflow as a prompt: node id to {class_type, inputs, _meta}."""
    return json.loads((API_FOLDER / f"{name}.api.json").read_text())


def is_link(value) -> bool:
    """Whether an input of the API format is a link: [node id, output index]."""
    return isinstance(value, list)


def needs_wrapper(name: str) -> bool:
    """Whether a workflow is for WanVideoWrapper, whose nodes it has."""
    return any(node["class_type"].startswith(WRAPPER) for node in api(name).values())
