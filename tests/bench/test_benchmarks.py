"""Benchmarks that nobody imports rot."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("bench_*.py")))
def test_benchmark_can_be_imported_and_has_shapes(name, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), HERE / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert list(module.shapes())
