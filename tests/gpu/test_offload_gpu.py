"""A model of 14B width with room for half of it keeps its 8-bit products and its speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = Path(__file__).with_name("offload_session.py")
HOST = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
# Weights come over PCIe while the layers before them multiply.
MAX_RATIO = 1.25


@pytest.fixture(scope="module", params=["dynamic", "legacy"])
def seen(request):
    if not HOST.is_dir():
        pytest.skip(f"no ComfyUI at {HOST}")
    run = subprocess.run(
        [sys.executable, str(SESSION), request.param], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))
    return report


def test_mode_is_the_one_asked_for(seen):
    assert seen["dynamic"] == (seen["mode"] == "dynamic")


def test_half_a_model_in_memory_gives_the_same_result_with_the_same_products(seen):
    assert seen["difference"] == 0
    assert seen["capped"]["products"] == seen["resident"]["products"] > 0


def test_weights_were_streamed_and_hardly_slowed_it_down(seen):
    assert seen["capped"]["copies"] > seen["resident"]["copies"]
    assert seen["ratio"] < MAX_RATIO
