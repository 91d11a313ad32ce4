"""torch.compile of our models in a real ComfyUI: graphs, breaks, compilations."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.host.compile_linear_session import CASES
from tests.host.server import HostMissingError, find_host

# A minute, and `tests/quant/model/test_compile.py` counts the same without ComfyUI.
pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("compile_linear_session.py")
TIMEOUT_S = 600
# The first block reads another layout of memory, a transposed view, in the host's own model.
GRAPHS = 2


@pytest.fixture(scope="module")
def seen() -> dict:
    """What the session printed."""
    try:
        root, python = find_host()
    except HostMissingError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [python, PROGRAM, root], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [name for name, *_ in CASES])
def test_blocks_are_compiled_once_without_breaks(seen, name):
    assert seen[name]["same"]
    assert seen[name]["graphs"] == GRAPHS
    assert seen[name]["breaks"] == {}


def test_whole_model_is_one_graph(seen):
    assert seen["whole"] == {"same": True, "graphs": 1, "breaks": {}}


def test_lora_adds_no_graph_and_no_break(seen):
    assert seen["lora"] == {"same": True, "graphs": GRAPHS, "breaks": {}}
    assert seen["whole_lora"] == {"same": True, "graphs": 1, "breaks": {}}


def test_differences_of_parameters_add_no_break_and_a_graph_for_each_set_of_loras(seen):
    assert seen["whole_differences"] == {"same": True, "graphs": 1, "breaks": {}}
    assert seen["whole_schedule"] == {"same": True, "graphs": 2, "breaks": {}}
    for name in ("differences", "schedule"):
        assert seen[name]["same"] and seen[name]["breaks"] == {}
    assert seen["felt"] > 0.01 and seen["same_without"]


@pytest.mark.parametrize("name", [name for name, *_ in CASES])
def test_clone_with_a_model_of_its_own_shares_no_module(seen, name):
    assert seen[name]["own_model"] == {"same": True, "shared_modules": 0}
