"""A model of 14B width with room for half of it keeps its 8-bit products and its speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SESSION = Path(__file__).with_name("offload_session.py")
EXPERTS = Path(__file__).with_name("experts_session.py")
HOST = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
# Weights come over PCIe while the layers before them multiply.
MAX_RATIO = 1.25


def report_of(session: Path, mode: str) -> dict:
    # Before needs_gpu, which is asked for every test.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not HOST.is_dir():
        pytest.skip(f"no ComfyUI at {HOST}")
    command = [sys.executable, str(session), mode]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))
    return report


@pytest.fixture(scope="module", params=["dynamic", "legacy"])
def seen(request):
    return report_of(SESSION, request.param)


def test_mode_is_the_one_asked_for(seen):
    assert seen["dynamic"] == (seen["mode"] == "dynamic")


def test_half_a_model_in_memory_gives_the_same_result_with_the_same_products(seen):
    assert seen["difference"] == 0
    assert seen["capped"]["products"] == seen["resident"]["products"] > 0


def test_weights_were_streamed_and_hardly_slowed_it_down(seen):
    streamed = seen["capped"]["copied_bytes"] - seen["resident"]["copied_bytes"]
    assert streamed >= seen["steps"] * seen["absent_bytes"] > 0
    assert seen["ratio"] < MAX_RATIO


@pytest.mark.parametrize("mode", ["dynamic", "legacy"])
def test_two_experts_take_turns_in_the_room_of_one(mode):
    """The GPU has no room for both: each step brings its expert, and gives the latent of before."""
    seen = report_of(EXPERTS, mode)
    assert seen["dynamic"] == (mode == "dynamic")
    assert seen["room_bytes"] < seen["needed_bytes"] + seen["model_bytes"] / 2
    assert seen["difference"] == 0
