"""Kernels in the interpreter, in processes of their own: Triton reads the switch when it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, which has the interpreter, is missing")


@pytest.mark.parametrize("name", ["interpreted.py", "interpreted_fp4.py"])
def test_kernels_agree_with_the_reference_in_the_interpreter(name):
    tests = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
