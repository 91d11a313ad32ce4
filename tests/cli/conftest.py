"""What the tests of the command line share: a small Wan, and a way to run a command."""

import json

import pytest

from lowbit.cli import main
from tests.cli.files import saved, wan_tensors


@pytest.fixture(scope="session")
def tensors(tmp_path_factory):
    return wan_tensors(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def wan(tmp_path_factory, tensors):
    return saved(tmp_path_factory.mktemp("wan") / "wan.safetensors", tensors)


@pytest.fixture
def lowbit(capsys):
    """Run a command and return (exit code, stdout, stderr)."""

    def run(*argv):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def lowbit_json(lowbit):
    """Run a command with --json and return (exit code, its object); nothing else may be printed."""

    def run(*argv):
        code, out, err = lowbit(*argv, "--json")
        assert not err
        return code, json.loads(out)

    return run
