"""Tests in this folder need an NVIDIA GPU; their results are kept in docs/results."""

import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def needs_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def idle_gpu():
    """Skip where other processes run on the GPUs: nothing can be timed beside them."""
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    torch.zeros(1, device="cuda")
    seen = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    if len(seen) > torch.cuda.device_count():
        pytest.skip(f"{len(seen)} processes run on the GPU; run this test alone")
