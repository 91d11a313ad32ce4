"""One ComfyUI server, and the model files it serves, for all host tests."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_lora, write_qwen_image, write_wan
from tests.host import graphs
from tests.host.server import HostMissingError, Server, find_host

HERE = Path(__file__).parent
WAN, WAN_LORA = "wan.safetensors", "wan_lora.safetensors"
WAN_I2V, WAN_VACE = "wan_i2v.safetensors", "wan_vace.safetensors"
QWEN_IMAGE = "qwen_image.safetensors"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    server = getattr(item, "funcargs", {}).get("comfy")
    if report.failed and server is not None:
        report.sections.append(("ComfyUI's log, its end", server.log_tail()))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """A running `Server`; skips where ComfyUI is not installed."""
    try:
        find_host()
    except HostMissingError as error:
        pytest.skip(str(error))
    server = Server(tmp_path_factory.mktemp("comfy"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def wan(comfy):
    """The name under which the loaders list a two-layer Wan of width 256."""
    write_wan(comfy.model_path(WAN))
    return WAN


@pytest.fixture(scope="session")
def wan_i2v(comfy):
    """The name of the image-to-video variant of `wan`."""
    write_wan(comfy.model_path(WAN_I2V), variant="i2v")
    return WAN_I2V


@pytest.fixture(scope="session")
def wan_vace(comfy):
    """The name of the variant of `wan` with a block of VACE's."""
    write_wan(comfy.model_path(WAN_VACE), variant="vace")
    return WAN_VACE


@pytest.fixture(scope="session")
def wan_lora(comfy, wan):
    """The name of a LoRA for every Linear in the blocks of `wan`."""
    write_lora(comfy.model_path(WAN_LORA, "loras"), comfy.model_path(wan))
    return WAN_LORA


@pytest.fixture(scope="session")
def qwen_image(comfy):
    """The name of a one-layer Qwen-Image of full width."""
    write_qwen_image(comfy.model_path(QWEN_IMAGE))
    return QWEN_IMAGE


@pytest.fixture(scope="session")
def sample(comfy):
    """A function (build, family) -> latent: build(graph) returns the model to sample with."""

    def run(build, family="wan", **options) -> torch.Tensor:
        graph = graphs.Graph()
        node = graphs.save(graph, graphs.sample(graph, build(graph), family, **options))
        return comfy.latent(comfy.run(graph), node)

    return run
