"""The nodes' work in ComfyUI on a GPU: with its dynamic memory, without, and streaming."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.ops.attention.modes import MODES
from lowbit.quant import formats
from tests.gpu.cuda_graphs_session import CASES, PLAIN

SESSION = Path(__file__).with_name("host_session.py")
GRAPHS_SESSION = Path(__file__).with_name("cuda_graphs_session.py")
HOST = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))


def report_of(session: Path, mode: str) -> dict:
    """Return what a session printed."""
    # Before needs_gpu, which is asked for every test.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not HOST.is_dir():
        pytest.skip(f"no ComfyUI at {HOST}")
    run = subprocess.run(
        [sys.executable, str(session), mode], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))
    return report


@pytest.fixture(scope="module", params=["dynamic", "legacy", "novram"])
def seen(request):
    return report_of(SESSION, request.param)


# Weights that are streamed from the CPU are no part of CUDA graphs.
@pytest.fixture(scope="module", params=["dynamic", "legacy"])
def graphed(request):
    return report_of(GRAPHS_SESSION, request.param)


def test_mode_is_the_one_asked_for(seen):
    assert seen["dynamic"] == (seen["mode"] == "dynamic")


@pytest.mark.parametrize("name", formats.names())
def test_model_is_quantized_undone_saved_and_patched(seen, name):
    row = seen["formats"][name]
    # See tolerance() in tests/host/test_nodes.py for the factor; four blocks here instead of two.
    assert 0 < row["error"] < 2**0.5 * 4 * formats.get(name).max_error
    # The host may convert a 16-bit model to float16 before the quantizing node sees it.
    assert row["between_nodes"] < 2**0.5 * 2 * formats.get(name).max_error
    assert row["plain_untouched"]
    assert row["same_after_unload"]
    assert row["same_after_saving"]
    assert 0.7 < row["lora_moves"] < 1.5


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *itertools.product(("int8_convrot", "fp8_e4m3", "nvfp4"), ("loaded", "quantized")),
        *itertools.product(("int8_convrot", "fp8_e4m3"), ("qwen_image",)),
    ],
)
def test_compiled_model_is_one_graph_and_computes_the_same(seen, name, what):
    row = seen["compiled"][f"{name} {what}"]
    if seen["mode"] != "novram":
        # Streamed weights may be copied between graphs.
        assert (row["graphs"], row["breaks"]) == (1, {})
    # Inductor rounds chains of 16-bit operations once, and quantizers then the other way.
    assert row["error"] < 2 * formats.get(name).max_error
    assert row["untouched"]


@pytest.mark.parametrize("name", ["exact", "int8"])
def test_attention_changes_its_own_branch_and_a_little(seen, name):
    assert 0 < seen["attention"][f"lowbit_{name}"] < 2 * MODES[name].max_error
    for way in ("sdpa", "cudnn", "flash"):
        assert seen["attention"][way] < 2 * MODES["exact"].max_error
    assert seen["attention_plain_untouched"]


def test_auto_takes_cudnn_for_few_tokens_on_hopper_alone(seen):
    hopper = seen["capability"] == [9, 0]
    assert seen["attention"]["auto"] == (seen["attention"]["cudnn"] if hopper else 0)


@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs_of_the_whole_model_are_those_of_16_bits_and_compute_the_same(graphed, name):
    row, plain, (fmt, _, loras) = graphed[name], graphed[PLAIN], CASES[name]
    assert row["raised"] is None
    # A graph for each set of LoRAs that act together.
    graphs = max(1, len(loras))
    assert (row["graphs"], row["breaks"]) == (graphs, {})
    # ComfyUI 0.33 begins Wan's time embedding on the CPU: torch records no graph of that.
    assert row["skipped"] == graphs * plain["skipped"]
    assert row["recorded"] >= graphs * min(1, plain["recorded"])
    # Some products may be chosen otherwise while a graph is recorded; what a graph forgets to read
    # is far more.
    max_error = formats.get(fmt).max_error
    assert max(row["error"], row["again"]) < 2 * max_error
    assert row["untouched"]
    if loras:
        assert row["moves"] > 5 * max_error
