"""Every node has a help page and English texts that say what its class and the records say."""

import json
import re
from pathlib import Path

import pytest

import lowbit
from lowbit.quant import formats, recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "web" / "docs"
NODES = lowbit.NODE_CLASS_MAPPINGS
every_node = pytest.mark.parametrize("node_id", NODES)
# Attention has no weights, so its pages say nothing of formats.
OF_NO_FORMAT = ("Attention", "Lora")
of_formats = pytest.mark.parametrize(
    "node_id", [n for n in NODES if not any(word in n for word in OF_NO_FORMAT)]
)


def page(node_id: str) -> str:
    return (PAGES / f"{node_id}.md").read_text(encoding="utf-8")


def inputs(node_id: str) -> dict:
    schema = NODES[node_id].INPUT_TYPES()
    return schema.get("required", {}) | schema.get("optional", {})


def first_cells(text: str) -> list[str]:
    """What the rows of the page's tables begin with, in code marks."""
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def texts(node_id: str) -> dict:
    """The node's entry of nodeDefs.json as its class has it."""
    node = NODES[node_id]
    outputs = zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True)
    return {
        "display_name": node.DISPLAY_NAME,
        "description": node.DESCRIPTION,
        "inputs": {
            name: {"name": name, "tooltip": settings["tooltip"]}
            for name, (_, settings) in inputs(node_id).items()
        },
        "outputs": {
            str(index): {"name": name, "tooltip": tooltip}
            for index, (name, tooltip) in enumerate(outputs)
        },
    }


def test_every_page_is_of_a_node():
    assert {path.stem for path in PAGES.glob("*.md")} == set(NODES)


@every_node
def test_page_bears_the_name_that_the_editor_shows(node_id):
    assert page(node_id).splitlines()[0] == f"# {NODES[node_id].DISPLAY_NAME}"


@every_node
def test_page_explains_every_input_and_output(node_id):
    names = [*inputs(node_id), *NODES[node_id].RETURN_NAMES]
    rows = first_cells(page(node_id))
    assert [name for name in names if name not in rows] == []


@of_formats
def test_page_names_every_format(node_id):
    assert [name for name in formats.names() if f"`{name}`" not in page(node_id)] == []


@every_node
def test_rows_of_formats_are_those_of_the_records(node_id):
    text = page(node_id)
    for name in set(first_cells(text)) & set(formats.names()):
        fmt = formats.get(name)
        assert f"| `{name}` | {fmt.bits:g} | {fmt.title} |" in text.splitlines()


@of_formats
def test_page_names_the_formats_that_need_this_pack(node_id):
    ours = " and ".join(f"`{name}`" for name in formats.names() if not formats.get(name).native)
    assert f"A stock ComfyUI loads saved files of every format but {ours}." in page(node_id)


@every_node
def test_page_with_a_recipe_names_them_all(node_id):
    if "recipe" in inputs(node_id):
        row = next(line for line in page(node_id).splitlines() if line.startswith("| `recipe` |"))
        assert [name for name in recipe.names() if f"`{name}`" not in row] == []


@every_node
def test_page_states_each_default(node_id):
    rows = {cells[0]: line for line in page(node_id).splitlines() if (cells := first_cells(line))}
    for name, (_, settings) in inputs(node_id).items():
        if settings.get("default") not in (None, "", False):
            assert f"`{settings['default']}`" in rows[name]


def test_english_texts_are_those_of_the_classes():
    path = ROOT / "locales" / "en" / "nodeDefs.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == {node_id: texts(node_id) for node_id in NODES}
