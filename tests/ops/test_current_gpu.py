"""The GPU of the tensors is the current one where packages of others run."""

import contextlib

import pytest
import torch

from lowbit.ops.current_gpu import on_gpu_of


@pytest.fixture
def entered(monkeypatch):
    """Shapes of the tensors whose GPU was made the current one, as if there were GPUs."""
    seen = []

    def device_of(x):
        seen.append(tuple(x.shape))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return seen


@torch.compiler.assume_constant_result
def asked_while_traced() -> int:
    with on_gpu_of(torch.zeros(3)):
        return 1


def run(x: torch.Tensor) -> torch.Tensor:
    with on_gpu_of(x):
        return x + asked_while_traced()


def test_graphs_see_to_it_themselves_but_not_for_what_runs_while_they_are_traced(entered):
    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]
    assert entered == [(3,)]
    entered.clear()
    assert run(torch.zeros(2)).tolist() == [1, 1]
    assert entered == [(2,), (3,)]


def test_nothing_is_asked_of_gpus_that_nobody_used(entered, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    run(torch.zeros(2))
    assert not entered
