"""Prompts against the schemas of the nodes that a real ComfyUI has."""

from tests.workflows import shipped

# their options are the user's own files
FILE_INPUTS = {"model", "model_name", "clip_name", "lora_name", "vae_name"}


def _options(kind, settings) -> list | None:
    if isinstance(kind, list):
        return kind
    return settings[0].get("options") if kind == "COMBO" and settings else None


def check_inputs(schemas: dict, prompt: dict) -> None:
    """Assert that nodes get what their schemas want, and options that these offer."""
    for key, node in prompt.items():
        schema = schemas[node["class_type"]]["input"]
        known = schema.get("required", {}) | schema.get("optional", {})
        given = node["inputs"]
        assert set(given) <= set(known), key
        assert set(schema.get("required", {})) <= set(given), key
        for name, value in given.items():
            kind, *settings = known[name]
            options = _options(kind, settings)
            if options is not None and name not in FILE_INPUTS:
                assert value in options, (key, name)


def check_order(schemas: dict, prompt: dict) -> None:
    """Assert that the values of widgets come in the order of the schemas, by which editors read."""
    for key, node in prompt.items():
        order = schemas[node["class_type"]]["input_order"]
        known = order.get("required", []) + order.get("optional", [])
        widgets = [name for name, value in node["inputs"].items() if not shipped.is_link(value)]
        assert widgets == sorted(widgets, key=known.index), key
