import importlib.util

import pytest

from lowbit.quant import demo

ROWS = [
    demo.Row("Wan", demo.SOURCE, "a", 0, 9_800_000, 16.0, 0.05),
    demo.Row("Wan", "int8", "b", 40, 5_700_000, 8.1, 0.1, 0.0114, 0.0177, 0.25, "kitchen"),
]


@pytest.fixture
def folders(monkeypatch):
    """The folders that the demo was asked for; it gives ROWS at once."""
    asked = []

    def run(out, progress):
        asked.append(out)
        progress(1, 1)
        return ROWS

    monkeypatch.setattr(demo, "run", run)
    return asked


def test_rows_are_printed_as_one_table(lowbit, folders):
    code, out, _ = lowbit("demo", "--out", "somewhere")
    assert code == 0 and folders == ["somewhere"]
    titles, source, int8 = (line.split() for line in out.splitlines()[:3])
    assert titles[:3] == ["model", "format", "layers"]
    assert source == ["Wan", "bf16", "0", "9.80", "16.00", "-", "-", "-", "0.050", "plain"]
    assert int8[:7] == ["Wan", "int8", "40", "5.70", "8.10", "0.0114", "0.0177"]


def test_output_says_what_the_times_mean_and_where_the_page_is(lowbit, folders):
    _, out, _ = lowbit("demo")
    assert "say nothing about a GPU" in out
    assert out.endswith("demo/demo.html\n") and folders == ["demo"]


@pytest.mark.parametrize("name", demo.PACKAGES)
def test_missing_package_is_told_in_one_line(lowbit, monkeypatch, tmp_path, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else found(n))
    code, out, err = lowbit("demo", "--out", tmp_path / "out")
    assert code == 2 and not out and not (tmp_path / "out").exists()
    assert err == f'lowbit: the demo needs {name}: pip install "{demo.PACKAGES[name]}"\n'
