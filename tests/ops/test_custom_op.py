"""Who sees an operation of ours: everybody who looks; a call that nobody watches costs less."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.ops.custom_op import NAMESPACE, custom_op

calls = []


def run(x: torch.Tensor, factor: float) -> torch.Tensor:
    calls.append(tuple(x.shape))
    return x * factor


double = custom_op(
    "test_double(Tensor x, float factor) -> Tensor", run, lambda x, f: x.new_empty(x.shape)
)


@pytest.fixture(autouse=True)
def nothing_called():
    calls.clear()


class Names(TorchDispatchMode):
    """Note the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def dispatched():
    """Return a function that makes a call and tells whether the dispatcher saw it."""

    def names(call):
        with profile() as seen:
            call()
        return any(event.key == f"{NAMESPACE}::test_double" for event in seen.key_averages())

    return names


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nobody_watches_where_no_gradients_are_recorded(dispatched, mode):
    with mode():
        assert not dispatched(lambda: double(torch.ones(2), 2.0))
    assert len(calls) == 1


def test_autograd_sees_the_operation(dispatched):
    assert dispatched(lambda: double(torch.ones(2), 2.0))


@torch.no_grad()
def test_parameter_goes_through_the_dispatcher(dispatched):
    assert dispatched(lambda: double(torch.nn.Parameter(torch.ones(2)), 2.0))


@torch.no_grad()
def test_mode_of_the_dispatcher_sees_the_operation():
    with Names() as names:
        double(torch.ones(2), 2.0)
    assert f"{NAMESPACE}.test_double.default" in names.seen


@torch.no_grad()
def test_transform_sees_the_operation():
    assert torch.func.vmap(lambda x: double(x, 2.0))(torch.ones(2, 3)).shape == (2, 3)
    assert calls == [(3,), (3,)]


@torch.no_grad()
def test_tangents_are_refused_and_not_lost():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(NotImplementedError, match="forward AD"):
            double(x, 2.0)
        assert torch.equal(double(torch.ones(2), 2.0), torch.full((2,), 2.0))
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda x: double(x, 2.0), (torch.ones(2),), (torch.ones(2),))
    assert torch.equal(double(torch.ones(2), 2.0), torch.full((2,), 2.0))


@torch.no_grad()
@pytest.mark.parametrize("within", [True, False])
def test_fake_and_meta_tensors_are_not_computed_with(within):
    mode = FakeTensorMode()
    with mode:
        fake = torch.ones(3)
        out = double(fake, 2.0) if within else None
    out = double(fake, 2.0) if out is None else out
    assert out.shape == (3,)
    assert double(torch.ones(3, device="meta"), 2.0).is_meta
    assert not calls


@torch.no_grad()
def test_trace_holds_the_operation():
    traced = torch.jit.trace(lambda x: double(x, 2.0), torch.ones(2), check_trace=False)
    assert f"{NAMESPACE}::test_double" in str(traced.graph)


@torch.no_grad()
def test_compiled_graph_holds_the_operation():
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    torch._dynamo.reset()
    run = torch.compile(lambda x: double(x, 2.0), fullgraph=True, backend=backend)
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))
    assert len(graphs) == 1
    assert f"{NAMESPACE}.test_double" in graphs[0]


@torch.no_grad()
def test_export_holds_the_operation():
    class Module(torch.nn.Module):
        def forward(self, x):
            return double(x, 2.0)

    for strict in (True, False):
        graph = torch.export.export(Module(), (torch.ones(2),), strict=strict).graph
        assert f"{NAMESPACE}.test_double" in str(graph)
