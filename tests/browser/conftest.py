"""One ComfyUI server and one browser page for all browser tests.

The server is not the one of the host tests: it has its own user, whose settings keep the first
visit's tour away, and placeholders for the files that the shipped workflows name.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.checkpoints import write_wan
from tests.host.server import HostMissingError, Server, find_host
from tests.workflows import shipped

HERE = Path(__file__).parent
WAN = "wan.safetensors"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # nothing but the server under test is reached
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
WINDOW = {"width": 1600, "height": 1000}
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
# where ComfyUI looks for the files of these inputs
FOLDERS = {
    "model_name": "diffusion_models",
    "clip_name": "text_encoders",
    "lora_name": "loras",
    "vae_name": "vae",
}
TIMEOUT_MS = 30_000


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a chromium; skips without one, or without Playwright."""
    pytest.importorskip("playwright", reason="Playwright is not installed: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    return found


@pytest.fixture(scope="package")
def comfy(chromium, tmp_path_factory):
    """A running `Server` with a user who is past the tour, and a small Wan called WAN."""
    try:
        find_host()
    except HostMissingError as error:
        pytest.skip(str(error))
    server = Server(tmp_path_factory.mktemp("comfy"))
    settings = server.base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    _place_files(server)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _place_files(server: Server) -> None:
    """Write the small Wan, and an empty file for each that a workflow names: none is read."""
    write_wan(server.model_path(WAN))
    for name in shipped.NAMES:
        for node in shipped.api(name).values():
            for key in node["inputs"].keys() & FOLDERS.keys():
                path = server.model_path(node["inputs"][key], FOLDERS[key])
                path.parent.mkdir(exist_ok=True)
                path.touch()


@pytest.fixture(scope="package")
def page(chromium, comfy, tmp_path_factory):
    """An `Editor`'s page, loaded once; see `editor`."""
    from playwright.sync_api import expect, sync_playwright

    from tests.browser.editor import Editor

    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("user"),
            executable_path=chromium,
            args=FLAGS,
            viewport=WINDOW,
        )
        context.set_default_timeout(TIMEOUT_MS)
        editor = Editor(context.pages[0], comfy.url)
        editor.start("LowBitModelReport")
        yield editor
        context.close()


@pytest.fixture
def editor(page):
    """The editor with nothing on its canvas."""
    page.clear()
    page.page_errors.clear()
    return page
