"""ComfyUI's editor in a browser, driven as a user drives it."""

import json

from playwright.sync_api import Locator, Page, expect

# the editor is ready once it knows the nodes of all packs
READY = "() => Boolean(window.app?.vueAppReady && LiteGraph.registered_node_types[{type}])"
# Clearing the canvas is not enough: the editor keeps the values of widgets, and gives them to the
# next node with the same number.
CLEAR = "() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')"
# [number of nodes, types that the editor does not know]
COUNT = """() => [app.graph.nodes.length,
    app.graph.nodes.map(n => n.type).filter(t => !(t in LiteGraph.registered_node_types))]"""
ADD = """type => {
    const node = LiteGraph.createNode(type)
    node.pos = [300, 400]
    app.graph.add(node)
    app.canvas.selectNode(node)
    return (node.widgets ?? []).map(w => ({
        name: w.name, label: w.label, type: w.type, value: w.value,
        options: w.options?.values ?? null }))
}"""
# errors of a workflow are shown a moment after it is loaded
SETTLE_MS = 500
START_TIMEOUT_MS = 60_000


class Editor:
    """One page with the editor, at `url`. page_errors: exceptions that no script caught."""

    def __init__(self, page: Page, url: str):
        self.page = page
        self.url = url
        self.page_errors: list[str] = []
        page.on("pageerror", lambda error: self.page_errors.append(str(error)))

    def start(self, node_type: str) -> None:
        """Open the editor and wait until it knows nodes of `node_type`."""
        self.page.goto(self.url)
        ready = READY.format(type=json.dumps(node_type))
        self.page.wait_for_function(ready, timeout=START_TIMEOUT_MS)

    def clear(self) -> None:
        """Close what a test left open and begin an empty workflow."""
        for _ in range(2):
            self.page.keyboard.press("Escape")
        self.page.evaluate(CLEAR)

    def get(self, path: str):
        """Return the JSON that the server answers."""
        return self.page.request.get(self.url + path).json()

    def open(self, workflow: dict, title: str | None = None) -> tuple[int, list[str]]:
        """Load a workflow; return (number of nodes, types that the editor does not know).

        title: of the tab, one that no other tab has; None for the editor's own.
        """
        self.page.evaluate(
            "args => app.loadGraphData(args[0], true, true, args[1])", [workflow, title]
        )
        self.page.wait_for_timeout(SETTLE_MS)
        return tuple(self.page.evaluate(COUNT))

    def types(self) -> list[str]:
        """The types of the nodes on the canvas."""
        return self.page.evaluate("() => app.graph.nodes.map(n => n.type)")

    @property
    def errors(self) -> Locator:
        """The box that tells what is wrong with a workflow."""
        return self.page.get_by_test_id("error-overlay")

    def add(self, node_type: str) -> list[dict]:
        """Add a node, select it and return its widgets: name, label, type, value, options."""
        return self.page.evaluate(ADD, node_type)

    def help(self) -> Locator:
        """Open the help page of the selected node and return it."""
        self.page.get_by_test_id("info-button").click()
        return self.page.locator(".node-help-content")

    def search(self, words: str) -> Locator:
        """Open the search box on the canvas, type `words` and return the results."""
        # Not by a double click: a busy machine sees two single ones.
        command = "Workspace.SearchBox.Toggle"
        self.page.evaluate("name => app.extensionManager.command.execute(name)", command)
        box = self.page.get_by_role("combobox", name="Add a node")
        expect(box).to_be_focused()
        self.page.keyboard.type(words)
        return self.page.get_by_test_id("result-item")

    def open_templates(self, pack: str) -> Locator:
        """Open the templates of a pack and return their cards."""
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_role("dialog").get_by_text(pack, exact=True).click()
        return self.page.locator("[data-testid^='template-workflow-']")

    def run(self) -> str:
        """Press Run and return the prompt's id."""
        with self.page.expect_response("**/api/prompt") as reply:
            self.page.get_by_test_id("queue-button").click()
        return reply.value.json()["prompt_id"]

    def wait_until(self, condition: str, timeout_s: float = 10) -> None:
        """Wait until a JavaScript function returns something true."""
        self.page.wait_for_function(condition, timeout=timeout_s * 1000)
