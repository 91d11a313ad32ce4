"""What the guard finds and what it lets pass, with ways that break in the manners users report."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources, PTXASError

from lowbit.ops import registry
from lowbit.ops.attention import guard, router, ways
from lowbit.ops.attention.guard import EVERY_CALL, FIRST_CALL, OFF
from lowbit.ops.registry import Backend, Needs

WAY = "lowbit_exact"


@pytest.fixture(autouse=True)
def forgetful():
    guard.forget()
    yield
    guard.forget()


def inputs(length: int = 33, keys: int = 45, kv: int = 2, dtype: torch.dtype = torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, length, 64), (2, kv, keys, 64), (2, kv, keys, 64))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


class Way:
    """torch's attention, spoilt by a function of its result; counts its calls."""

    def __init__(self, spoil=lambda out: out):
        self.spoil, self.calls = spoil, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.spoil(ways.sdpa(*arguments))


def run(way: Way, checked: str, *arguments, mask=None, causal=False) -> torch.Tensor:
    return guard.run(WAY, way, checked, *(arguments or inputs()), mask, causal, None)


def test_rotated_calls_have_a_verdict_of_their_own(caplog):
    q, k, v = inputs()
    want = ways.sdpa(q, k, v, None, False, None)

    def way(*arguments, rotate=False):
        return torch.zeros_like(want) if rotate else ways.sdpa(*arguments)

    call = (WAY, way, FIRST_CALL, q, k, v, None, False, None)
    for rotate in (False, True, False):
        assert torch.equal(guard.run(*call, rotate=rotate), want)
    assert len(caplog.records) == 1


BROKEN = {
    "black": torch.zeros_like,
    "nan": lambda out: torch.full_like(out, torch.nan),
    "noise": torch.randn_like,
    "layout": lambda out: out.flip(2),
    "scale": lambda out: out * 1.5,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_way_is_found_at_once_and_not_asked_again(kind, caplog):
    way, (q, k, v) = Way(BROKEN[kind]), inputs()
    want = ways.sdpa(q, k, v, None, False, None)
    for _ in range(3):
        assert torch.equal(run(way, FIRST_CALL, q, k, v), want)
    assert way.calls == 1
    (record,) = caplog.records
    assert "lowbit_exact is wrong for q [2, 4, 33, 64], k [2, 2, 45, 64]" in record.message
    assert "at most 0.25 is allowed" in record.message


def test_without_a_guard_what_a_way_gives_is_given(caplog):
    assert not run(Way(BROKEN["black"]), OFF).any()
    assert not caplog.records


def test_verdict_is_of_one_shape_alone():
    run(Way(BROKEN["black"]), FIRST_CALL)
    way = Way()
    run(way, FIRST_CALL, *inputs(length=34))
    assert way.calls == 1


@pytest.mark.parametrize("kind", ["plain", "masked", "added", "causal", "both", "hidden rows"])
@pytest.mark.parametrize("length", [1, 45, 600])
def test_right_way_passes(kind, length, caplog):
    q, k, v = inputs(length)
    mask = torch.ones(1, 1, length, 45, dtype=torch.bool).tril(3)
    if kind == "hidden rows":
        mask[..., ::2, :] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    masks = {"masked": mask, "both": mask, "hidden rows": mask, "added": added.bfloat16()}
    options = {"mask": masks.get(kind), "causal": kind == "causal"}
    way = Way()
    out = [run(way, FIRST_CALL, q, k, v, **options) for _ in range(2)]
    assert way.calls == 2 and out[0].shape == q.shape
    assert not caplog.records


def test_error_of_8_bits_passes(caplog):
    run(Way(lambda out: out + 0.1 * out.std() * torch.randn_like(out)), FIRST_CALL)
    assert not caplog.records


def test_tail_of_the_sequence_is_looked_at():
    def stale(out):
        return torch.cat((out[:, :, :400], torch.zeros_like(out[:, :, 400:])), 2)

    want = ways.sdpa(*inputs(600), None, False, None)
    assert torch.equal(run(Way(stale), FIRST_CALL, *inputs(600)), want)


def test_inputs_that_are_not_finite_say_nothing_of_a_way(caplog):
    q, k, v = inputs()
    way = Way()
    run(way, FIRST_CALL, q, k, torch.full_like(v, torch.nan))
    assert not caplog.records and not guard._verdicts
    run(way, FIRST_CALL, q, k, v)
    assert list(guard._verdicts.values()) == [None]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_later_nan_is_replaced_when_every_call_is_checked(value, caplog):
    way, (q, k, v) = Way(), inputs()
    want = run(way, EVERY_CALL, q, k, v)
    way.spoil = lambda out: out.index_fill(2, torch.tensor([3]), value)
    assert not run(way, FIRST_CALL, q, k, v).isfinite().all()
    for _ in range(2):
        assert torch.equal(run(way, EVERY_CALL, q, k, v), want)
    (record,) = caplog.records
    assert "lowbit_exact gave NaN or infinity" in record.message


def test_nothing_is_checked_while_a_cuda_graph_is_recorded(monkeypatch):
    monkeypatch.setattr(guard, "_is_recording", lambda q: True)
    assert not run(Way(BROKEN["black"]), EVERY_CALL).any()
    assert not guard._verdicts


def test_way_that_was_found_broken_is_not_recorded(monkeypatch):
    broken, want = Way(BROKEN["black"]), ways.sdpa(*inputs(), None, False, None)
    assert torch.equal(run(broken, FIRST_CALL), want)
    monkeypatch.setattr(guard, "_is_recording", lambda q: True)
    assert torch.equal(run(broken, FIRST_CALL), want)


def test_empty_inputs_pass():
    q, k, v = inputs()
    assert run(Way(), EVERY_CALL, q[:0], k[:0], v[:0]).shape == (0, 4, 33, 64)


@pytest.mark.parametrize("checked", [FIRST_CALL, EVERY_CALL])
def test_guard_is_no_break_of_a_compiled_graph(monkeypatch, checked):
    monkeypatch.setattr(ways, "attention", lambda q, k, v, *args, **options: torch.zeros_like(q))
    counter = CompileCounterWithBackend("aot_eager")
    q, k, v = inputs()

    def model(q):
        return router.route(q * 2, k, v, WAY, guard=checked) + 1

    got = torch.compile(model, fullgraph=True, backend=counter)(q)
    assert counter.frame_count == 1
    assert torch.equal(got, ways.sdpa(q * 2, k, v, None, False, None) + 1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda out: out, None),
        (BROKEN["black"], "errs by 1.00 here, at most 0.25 is allowed"),
        (BROKEN["nan"], "errs by nan here, at most 0.25 is allowed"),
    ],
)
def test_trial_tells_what_is_wrong_on_a_device(spoil, reason):
    assert ways.trial(Way(spoil), 128, 0.25)(torch.device("cpu")) == reason


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ImportError, ValueError])
def test_trial_passes_on_why_a_package_fails(error):
    def fails(*arguments):
        raise error("SM90 kernel is not available")

    text = ways.trial(fails, 128, 0.25)(torch.device("cpu"))
    assert text == f"fails here: {error.__name__}: SM90 kernel is not available"


@pytest.mark.parametrize("error", [OutOfResources(1, 0, "shared memory"), PTXASError("no")])
def test_trial_passes_on_why_triton_cannot_compile(error):
    """Triton's errors are no RuntimeErrors."""
    assert isinstance(error, TritonError) and not isinstance(error, RuntimeError)

    def fails(*arguments):
        raise error

    text = ways.trial(fails, 64, 0.25)(torch.device("cpu"))
    assert text == f"fails here: {type(error).__name__}: {error}"


def test_ways_of_torch_and_of_packages_are_tried_before_they_are_used():
    for backend in registry.backends(ways.OP):
        ours = backend.name == "sdpa" or backend.name.startswith("lowbit_")
        # Of ours only what no GPU has run yet.
        unproven = backend.name == ways.FP4 and "cuda" in backend.needs.devices
        assert (backend.needs.self_test is None) == (ours and not unproven), backend.name


def test_results_lie_in_memory_as_the_queries_do(monkeypatch):
    """A way may lay its result out as it likes; what a compiled graph was told has to hold."""
    name = "double"
    odd = Backend(
        ways.OP, name, 99, Needs(frozenset({"bfloat16"})), lambda q, *rest: q.mT.clone().mT
    )
    monkeypatch.setitem(registry._BACKENDS, ways.OP, [*registry.backends(ways.OP), odd])
    monkeypatch.setattr(router, "NAMES", (*router.NAMES, name))
    q, k, v = inputs(45, kv=4)
    flat = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert router.route(q, k, v, name).is_contiguous()
    assert router.route(flat, k, v, name).transpose(1, 2).is_contiguous()
