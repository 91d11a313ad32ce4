"""The pack in ComfyUI's own editor: what a user sees, and one workflow run from there."""

import os
import re

import pytest

import lowbit
from lowbit.nodes.inputs import AS_STORED
from lowbit.quant import formats, recipe
from tests.browser.conftest import WAN
from tests.host import graphs
from tests.host.server import PACK_FOLDER, REPO
from tests.workflows import shipped

expect = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed").expect

NODES = lowbit.NODE_CLASS_MAPPINGS
SCREENSHOT = REPO / "docs" / "editor.png"
RUN_WORKFLOW = "wan2.1_t2v_int8"
every_node = pytest.mark.parametrize("node_id", NODES)

# A text encoder and a VAE are gigabytes, so the tests have neither: random embeddings take the
# place of the encoded prompts, and the latent is saved as it is. Everything between, this pack's
# part, stays as shipped but for the model's file, the size and the number of steps.
REPLACE = """({embeddings, values}) => {
    const graph = app.graph
    const all = type => graph.nodes.filter(n => n.type === type)
    const put = (type, old) => {
        const node = LiteGraph.createNode(type)
        graph.add(node)
        node.pos = [...old.pos]
        node.size = [old.size[0], node.size[1]]
        return node
    }
    const set = (node, values) => {
        for (const [name, value] of Object.entries(values))
            node.widgets.find(w => w.name === name).value = value
    }
    for (const old of all('CLIPTextEncode')) {
        const node = put('LowBitTestConditioning', old)
        set(node, {...embeddings, seed: old.id})
        for (const id of [...old.outputs[0].links]) {
            const link = graph.links.get(id)
            node.connect(0, graph.getNodeById(link.target_id), link.target_slot)
        }
    }
    for (const old of all('VAEDecode')) {
        const source = old.getInputNode(0)
        source.connect(0, put('SaveLatent', old), 0)
    }
    for (const type of ['CLIPTextEncode', 'CLIPLoader', 'VAEDecode', 'VAELoader',
                        'SaveAnimatedWEBP'])
        all(type).forEach(n => graph.remove(n))
    for (const [type, widgets] of Object.entries(values))
        all(type).forEach(n => set(n, widgets))
}"""
PLOT_IS_SHOWN = "() => app.graph.nodes.find(n => n.type === 'PreviewImage').imgs?.[0]?.complete"


def broken_workflow() -> dict:
    workflow = shipped.editor(shipped.NAMES[0])
    workflow["nodes"][0]["type"] = "NodeOfNoPack"
    return workflow


# first, as the tabs of the other tests would stand in its picture
def test_shipped_workflow_runs_to_the_end_and_shows_its_report(editor, comfy):
    spec = graphs.FAMILIES["wan"]
    editor.open(shipped.editor(RUN_WORKFLOW), RUN_WORKFLOW)
    changes = {
        "embeddings": {"length": 16, "width": spec.text_width},
        "values": {
            "LowBitLoadDiffusionModel": {"model_name": WAN},
            spec.latent_node: spec.latent_inputs,
            "KSampler": {"steps": 2},
        },
    }
    editor.page.evaluate(REPLACE, changes)
    entry = comfy.wait(editor.run())
    assert entry["status"]["status_str"] == "success"
    saver = next(key for key, out in entry["outputs"].items() if "latents" in out)
    assert comfy.latent(entry, saver).isfinite().all()
    report = editor.page.locator(".widget-text-preview textarea")
    expect(report).to_have_value(re.compile(r"blocks\.0\.self_attn\.q +int8_convrot"))
    editor.wait_until(PLOT_IS_SHOWN)
    expect(editor.errors).to_have_count(0)
    if os.environ.get("LOWBIT_SCREENSHOT") == "1":
        editor.page.screenshot(path=SCREENSHOT)


def test_editor_reports_a_missing_node(editor):
    _, unknown = editor.open(broken_workflow())
    assert unknown == ["NodeOfNoPack"]
    expect(editor.errors).to_contain_text("NodeOfNoPack")


# The editor of the tests has no WanVideoWrapper.
@pytest.mark.parametrize("name", [n for n in shipped.NAMES if not shipped.needs_wrapper(n)])
def test_shipped_workflow_opens_with_no_missing_node_or_file(editor, name):
    workflow = shipped.editor(name)
    assert editor.open(workflow) == (len(workflow["nodes"]), [])
    expect(editor.errors).to_have_count(0)
    assert editor.page_errors == []


def test_pack_offers_its_workflows_as_templates(editor):
    assert sorted(editor.get("/api/workflow_templates")[PACK_FOLDER]) == shipped.NAMES
    cards = editor.open_templates(PACK_FOLDER)
    expect(cards.filter(has_text=shipped.NAMES[0])).to_be_visible()
    for name in shipped.NAMES:
        expect(cards.filter(has_text=name)).to_have_count(1)
    cards.filter(has_text=shipped.NAMES[0]).click()
    expect(editor.page.get_by_role("dialog")).to_have_count(0)
    editor.wait_until("() => app.graph.nodes.some(n => n.type === 'LowBitLoadDiffusionModel')")


@every_node
def test_node_shows_its_widgets(editor, node_id):
    inputs = NODES[node_id].INPUT_TYPES()
    schema = {**inputs["required"], **inputs.get("optional", {})}
    widgets = {widget["name"]: widget for widget in editor.add(node_id)}
    sockets = {name for name, (kind, _) in schema.items() if kind in ("MODEL", "WANVIDEOMODEL")}
    assert list(widgets) == [name for name in schema if name not in sockets]
    for name, widget in widgets.items():
        assert widget["label"] in (None, name)
        # A list of files has none.
        if "default" in schema[name][1]:
            assert widget["value"] == schema[name][1]["default"]
    if "format" in widgets:
        options = widgets["format"]["options"]
        assert options == schema["format"][0]
        assert options[-len(formats.names()) - 1 :] == [AS_STORED, *formats.names()]
        assert widgets["recipe"]["options"] == list(recipe.names())
        assert widgets["keep"]["type"] == "customtext"
    if "model_name" in widgets:
        assert WAN in widgets["model_name"]["options"]


@every_node
def test_help_panel_shows_the_nodes_page(editor, node_id):
    editor.add(node_id)
    page = editor.help()
    expect(page.locator("h1")).to_have_text(NODES[node_id].DISPLAY_NAME)
    shown = formats.names() if "format" in NODES[node_id].INPUT_TYPES()["required"] else ()
    for name in (*NODES[node_id].INPUT_TYPES()["required"], *shown):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()


@every_node
def test_node_is_found_by_its_display_name_and_added(editor, node_id):
    name = NODES[node_id].DISPLAY_NAME
    first = editor.search(name).first
    expect(first).to_contain_text(name)
    editor.page.keyboard.press("Enter")
    editor.wait_until("() => app.graph.nodes.length === 1")
    assert editor.types() == [node_id]


def test_server_hands_out_the_english_texts(editor):
    texts = editor.get("/api/i18n")["en"]["nodeDefs"]
    assert set(NODES) <= set(texts)
