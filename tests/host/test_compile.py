"""The attention node in a ComfyUI that compiles: one graph, the same latent, the calls it means."""

from pathlib import Path

import pytest

from tests.host.server import session

SESSION = Path(__file__).with_name("compile_session.py")
# The small model's blocks, each of which attends to itself, to the text and to the image.
BLOCKS = 2


@pytest.fixture(scope="module")
def seen():
    return session(SESSION)


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [
        ("default", 1),
        ("every call checked", 1),
        # One for the steps before, one for those after.
        ("from a step on", 2),
        ("rotated", 1),
        ("vace", 1),
    ],
)
def test_compiled_model_is_one_graph_and_gives_the_same_latent(seen, kind, graphs):
    row = seen["compiled"][kind]
    assert row["graphs"] == graphs
    assert row["difference"] == 0
    assert row["changed"] > 0


def test_layers_of_image_to_video_are_told_apart(seen):
    one_each = dict.fromkeys(("self", "cross", "image_cross"), BLOCKS)
    assert seen["layers"] == {**one_each, "all": 3 * BLOCKS}


def test_model_that_the_host_loads_again_computes_in_one_dtype(seen):
    row = seen["loaded again"]
    assert row["another model"]
    assert row["dtype"] == "torch.float16"
    assert row["difference"] == 0
