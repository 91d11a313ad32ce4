"""Kernels in the interpreter, in a process of its own: Triton reads the switch when it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, which has the interpreter, is missing")


def test_kernels_agree_with_the_reference_in_the_interpreter():
    """All `interpreted*.py` below this folder."""
    tests = sorted(map(str, Path(__file__).parent.rglob("interpreted*.py")))
    assert tests
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
