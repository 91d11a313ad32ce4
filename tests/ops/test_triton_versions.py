"""The kernels compiled with the oldest and the newest Triton too, each in a process of its own.

`make test` puts them into `build/triton-VERSION`. What they compile is marked `every_triton`: every
kernel for every architecture at least once.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.ops import linear, quantize_rows, registry, scaled_mm
from lowbit.ops.launch import TRITON_MIN
from tests.ops import triton_versions
from tests.ops.triton_versions import OLDEST, VERSIONS

ROOT = Path(__file__).resolve().parents[2]
OPS = (linear.OP, quantize_rows.OP, scaled_mm.OP)
# The version is checked within the process: another Triton on the path would pass as well.
CODE = """
import sys
import pytest
import triton
assert triton.__version__ == sys.argv[1], triton.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


def folder(version: str) -> Path:
    return ROOT / "build" / f"triton-{version}"


def start(version: str) -> subprocess.Popen:
    paths = filter(None, [str(folder(version)), os.environ.get("PYTHONPATH")])
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    files = sorted(str(path) for path in (ROOT / "tests" / "ops").rglob("test_aot.py"))
    options = ["-q", "-x", "-m", "every_triton", "-p", "no:cacheprovider", *files]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, version, *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def processes():
    """One process per version that is installed, all at the same time."""
    there = [v for v in triton_versions.extra() if (folder(v) / "triton").is_dir()]
    running = {version: start(version) for version in there}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("version", triton_versions.extra())
def test_every_kernel_compiles_for_every_architecture(processes, version):
    if version not in processes:
        pytest.skip(f"{folder(version)} is missing; `make tritons` makes it")
    output, _ = processes[version].communicate(timeout=600)
    assert processes[version].returncode == 0, output[-6000:]
    assert int(re.search(r"(\d+) passed", output)[1]) > 0


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def test_versions_are_in_order():
    assert list(VERSIONS) == sorted(VERSIONS, key=numbers)


@pytest.mark.parametrize("op", OPS)
def test_backends_need_the_oldest_that_is_compiled_with(op):
    needs = [b.needs for b in registry.backends(op) if b.name == "triton"]
    assert needs
    assert all(need.package_min == TRITON_MIN for need in needs)
    assert numbers(OLDEST)[: len(TRITON_MIN)] == TRITON_MIN
