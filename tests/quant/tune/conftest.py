import pytest

from lowbit.ops import tuning
from tests.quant.tune.bench import GPU


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of this test's own on a CPU that passes for a GPU; returns its folder."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "gpu", lambda device: GPU)
    monkeypatch.setattr(tuning, "_used", {})
    tuning.forget()
    yield tmp_path
    monkeypatch.undo()
    tuning.forget()
