import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.registry import Backend, Call, Needs, NoBackendError

OP = "test op"
CPU = torch.device("cpu")
ANY = Needs(frozenset({"scheme"}))
CALL = Call("scheme", CPU, n=48, k=96)


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    """No backends, and no choice remembered, before and after."""
    monkeypatch.setattr(registry, "_BACKENDS", {})
    registry.select.cache_clear()
    registry._self_test.cache_clear()
    yield
    registry.select.cache_clear()
    registry._self_test.cache_clear()


def add(name: str, rank: int, needs: Needs = ANY) -> Backend:
    backend = Backend(OP, name, rank, needs, lambda: name)
    registry.register(backend)
    return backend


def needs(**fields) -> Needs:
    return Needs(frozenset({"scheme"}), **fields)


def test_auto_picks_the_lowest_rank_whatever_the_order():
    add("slow", 30)
    fast = add("fast", 10)
    add("middling", 20)
    assert registry.select(OP, CALL) is fast
    assert [b.name for b in registry.backends(OP)] == ["fast", "middling", "slow"]


def test_auto_passes_over_a_backend_whose_needs_do_not_hold():
    add("gpu", 10, needs(devices=frozenset({"cuda"})))
    slow = add("slow", 30)
    assert registry.select(OP, CALL) is slow


def test_named_backend_is_taken_though_another_ranks_first():
    add("fast", 10)
    slow = add("slow", 30)
    assert registry.select(OP, CALL, "slow") is slow


def test_named_backend_that_cannot_run_raises_and_no_other_takes_over():
    add("gpu", 10, needs(devices=frozenset({"cuda"})))
    add("slow", 30)
    with pytest.raises(
        NoBackendError, match=r"gpu: needs a device of \['cuda'\], got cpu"
    ) as error:
        registry.select(OP, CALL, "gpu")
    assert "slow" not in str(error.value)


def test_one_name_may_stand_for_several_backends():
    add("kitchen", 10, needs(devices=frozenset({"cuda"})))
    second = add("kitchen", 10)
    assert registry.select(OP, CALL, "kitchen") is second


def test_unknown_name_lists_the_known():
    add("slow", 30)
    add("fast", 10)
    with pytest.raises(ValueError, match="unknown backend 'fats'; known are auto, fast, slow"):
        registry.select(OP, CALL, "fats")


def test_no_backend_lists_the_reason_of_each():
    add("one", 1, needs(k_multiple=64))
    add("two", 2, Needs(frozenset({"another"})))
    with pytest.raises(NoBackendError) as error:
        registry.select(OP, CALL)
    text = str(error.value)
    assert text.startswith(f"{OP} scheme: no backend fits.")
    assert "one: K=96 is not a multiple of 64" in text
    assert "two: does not know scheme" in text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"devices": frozenset({"cpu", "cuda"})}, None),
        ({"devices": frozenset({"cuda", "xpu"})}, "needs a device of ['cuda', 'xpu'], got cpu"),
        ({"k_multiple": 32}, None),
        ({"k_multiple": 64}, "K=96 is not a multiple of 64"),
        ({"n_multiple": 16}, None),
        ({"n_multiple": 32}, "N=48 is not a multiple of 32"),
        ({"package": "torch"}, None),
        ({"package": "no_such_package"}, "package no_such_package is missing"),
        ({"capability": (9, 0)}, None),
        ({"self_test": lambda device: None}, None),
        ({"self_test": lambda device: f"wrong on {device}"}, "wrong on cpu"),
    ],
)
def test_each_need_holds_or_says_why_not(fields, reason):
    assert registry.unmet(needs(**fields), CALL) == reason


def test_unknown_scheme_is_the_reason_before_all_others():
    wants = Needs(frozenset({"another"}), devices=frozenset({"cuda"}), k_multiple=7)
    assert registry.unmet(wants, CALL) == "does not know scheme"


@pytest.mark.parametrize(
    ("has", "reason"),
    [
        ((8, 6), "needs compute capability (8, 9), got (8, 6)"),
        ((8, 9), None),
        ((9, 0), None),
        ((12, 0), None),
    ],
)
def test_capability_is_at_least_what_is_needed(monkeypatch, has, reason):
    monkeypatch.setattr(registry, "capability", lambda device: has)
    call = Call("scheme", torch.device("cuda", 0), n=48, k=96)
    assert registry.unmet(needs(capability=(8, 9)), call) == reason


def test_capability_of_a_cpu_is_none():
    assert registry.capability(CPU) is None


def test_self_test_runs_once_per_device():
    devices = []
    backend = needs(self_test=lambda device: devices.append(device))
    for k in (96, 128):
        assert registry.unmet(backend, Call("scheme", CPU, n=48, k=k)) is None
    registry.unmet(backend, Call("scheme", torch.device("meta"), n=48, k=96))
    assert devices == [CPU, torch.device("meta")]


def test_self_test_is_not_run_where_another_need_fails():
    def explode(device):
        raise AssertionError("must not run")

    assert registry.unmet(needs(self_test=explode, k_multiple=64), CALL)


def test_choice_is_logged_once(caplog):
    add("only", 1)
    with caplog.at_level("INFO", logger=registry.__name__):
        for _ in range(3):
            registry.select(OP, CALL)
    assert [r.getMessage() for r in caplog.records] == [f"{OP} scheme on cpu: only"]


def test_operation_without_backends_has_none():
    assert registry.backends("nothing") == ()
