"""LoRAs on clones that have a model of their own in a real ComfyUI: compiled, on other GPUs."""

from pathlib import Path

import pytest

from tests.host.server import session


@pytest.fixture(scope="module")
def seen():
    return session(Path(__file__).with_name("lora_session.py"))


def test_clone_with_a_model_of_its_own_is_one_graph_and_leaves_nothing(seen):
    want = {"another model": True, "difference": 0, "compiled": 0, "graphs": 1, "left": 0}
    assert seen["own"] == want


def test_two_gpus_compute_side_by_side_what_one_does(seen):
    row = seen["two"]
    assert row["another model"] and row["felt"] > 0.05 and row["felt later"] > 0.05
    assert row["difference"] == [0, 0] and row["one added later"] == row["without"] == 0
