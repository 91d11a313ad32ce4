"""Every shipped workflow is whole, and says the same in both formats."""

import pytest

import lowbit
from tests.workflows import shipped

NOTES = {"MarkdownNote"}
# the editor puts its own widget, "what to do with the seed afterwards", behind each of these
SEEDS = {"seed", "noise_seed"}
pytestmark = pytest.mark.parametrize("name", shipped.NAMES)


def test_every_workflow_has_its_twin(name):
    assert shipped.api(name)
    assert len(list(shipped.API_FOLDER.iterdir())) == len(shipped.NAMES)


def test_every_node_is_ours_or_stock_or_the_wrappers(name):
    types = {node["class_type"] for node in shipped.api(name).values()}
    # a host test checks that that pack has them
    types = {kind for kind in types if not kind.startswith(shipped.WRAPPER)}
    assert types <= shipped.STOCK_NODES | set(lowbit.NODE_CLASS_MAPPINGS)
    assert types & set(lowbit.NODE_CLASS_MAPPINGS)


def test_twins_hold_the_same_nodes(name):
    nodes = shipped.editor(name)["nodes"]
    types = {str(node["id"]): node["type"] for node in nodes if node["type"] not in NOTES}
    assert types == {key: node["class_type"] for key, node in shipped.api(name).items()}


def test_twins_hold_the_same_widget_values(name):
    nodes = {str(node["id"]): node for node in shipped.editor(name)["nodes"]}
    for key, prompt_node in shipped.api(name).items():
        expected = []
        for input_name, value in prompt_node["inputs"].items():
            if not shipped.is_link(value):
                expected += [value, "fixed"] if input_name in SEEDS else [value]
        assert nodes[key]["widgets_values"] == expected, key


def test_twins_hold_the_same_links(name):
    expected = {
        (key, input_name): tuple(value)
        for key, node in shipped.api(name).items()
        for input_name, value in node["inputs"].items()
        if shipped.is_link(value)
    }
    workflow = shipped.editor(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    found = {}
    for link, source, output, target, slot, kind in workflow["links"]:
        socket = nodes[target]["inputs"][slot]
        assert (socket["link"], socket["type"]) == (link, kind)
        assert link in nodes[source]["outputs"][output]["links"]
        found[str(target), socket["name"]] = (str(source), output)
    assert found == expected


def test_ids_are_unique_and_counted(name):
    workflow = shipped.editor(name)
    node_ids = [node["id"] for node in workflow["nodes"]]
    link_ids = [link[0] for link in workflow["links"]]
    assert len(set(node_ids)) == len(node_ids)
    assert len(set(link_ids)) == len(link_ids)
    assert workflow["last_node_id"] == max(node_ids)
    assert workflow["last_link_id"] == max(link_ids)


def test_nodes_do_not_overlap(name):
    boxes = [(*node["pos"], *node["size"]) for node in shipped.editor(name)["nodes"]]
    for i, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:i]:
            beside = x + width <= other_x or other_x + other_width <= x
            above = y + height <= other_y or other_y + other_height <= y
            assert beside or above, (boxes[i], other_x, other_y)


def test_note_names_every_file_that_the_nodes_load(name):
    note = next(node for node in shipped.editor(name)["nodes"] if node["type"] in NOTES)
    files = [
        value
        for node in shipped.api(name).values()
        for value in node["inputs"].values()
        if str(value).endswith(".safetensors")
    ]
    assert files
    assert [file for file in files if file not in note["widgets_values"][0]] == []
