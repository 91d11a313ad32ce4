import io
import json
import resource
import subprocess
import sys

import pytest

from lowbit.cli import commands, output

HELP_SECONDS = 0.5
TRIES = 5


def test_commands_are_found_by_their_files():
    assert {"quantize", "inspect", "compare", "doctor"} <= commands().keys()
    for name, module in commands().items():
        assert callable(module.run) and callable(module.add_arguments), name


def test_help_imports_no_torch():
    code = "import sys, lowbit.cli\ntry: lowbit.cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_help_is_quick():
    # Seconds of CPU, the least of a few tries: the machine may be busy with something else.
    best = min(_cpu_seconds([sys.executable, "-m", "lowbit", "--help"]) for _ in range(TRIES))
    assert best < HELP_SECONDS


def _cpu_seconds(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["inspect"], ["doctor", "--colour"]])
def test_wrong_command_lines_are_told_in_one_line(lowbit, argv):
    code, out, err = lowbit(*argv)
    assert code == 2 and not out
    assert err.startswith("lowbit: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", sorted({"quantize", "inspect", "compare", "doctor", "tune"}))
def test_every_command_has_help(lowbit, command):
    code, out, _ = lowbit(command, "--help")
    assert code == 0 and f"lowbit {command}" in out


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_where_an_error_happened(lowbit, tmp_path, place):
    argv = ["inspect", tmp_path / "none.safetensors"]
    assert lowbit(*argv)[0] == 2
    with pytest.raises(ValueError, match="No such file"):
        lowbit(*(["--debug", *argv] if place == "before" else [*argv, "--debug"]))


def test_fault_of_ours_is_not_hidden(lowbit, monkeypatch):
    def fail(args):
        raise RuntimeError("a fault")

    monkeypatch.setattr(commands()["doctor"], "run", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        lowbit("doctor")


def test_missing_backend_is_told_in_one_line(lowbit, monkeypatch):
    from lowbit.ops.registry import NoBackendError

    def fail(args):
        raise NoBackendError("no backend fits.\nreference: no")

    monkeypatch.setattr(commands()["doctor"], "run", fail)
    assert lowbit("doctor") == (2, "", "lowbit: no backend fits. reference: no\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    with output.Progress("work", stream=stream) as progress:
        progress(5, 10)
        progress(10, 10)
    assert stream.getvalue().startswith("\rwork ██")
    assert "100%" in stream.getvalue() and stream.getvalue().endswith("\n")


def test_progress_elsewhere_is_a_line_every_tenth():
    stream = io.StringIO()
    with output.Progress("work", stream=stream) as progress:
        for done in range(1, 1001):
            progress(done, 1000)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10 and lines[-1].startswith("work 100%")


def test_json_writes_null_for_what_json_lacks(capsys):
    output.as_json({"a": float("nan"), "b": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5]}


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (14_200_000_000, "14.2 GB")]
)
def test_sizes_are_in_decimal_units(count, words):
    assert output.size(count) == words
