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
    registry._warn.cache_clear()
    yield
    registry.select.cache_clear()
    registry._self_test.cache_clear()
    registry._warn.cache_clear()


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


def test_reasons_are_those_of_the_needs_that_know_the_scheme():
    add("kitchen", 10, Needs(frozenset({"another"})))
    add("kitchen", 10, needs(devices=frozenset({"cuda"})))
    with pytest.raises(NoBackendError) as error:
        registry.select(OP, CALL, "kitchen")
    assert str(error.value).endswith("fits. kitchen: needs a device of ['cuda'], got cpu")


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


@pytest.fixture
def installed(monkeypatch):
    """Return a function that pretends a version of every package."""
    return lambda *version: monkeypatch.setattr(registry, "_version", lambda name: version)


OLD = "needs torch 3.5 or later, got 3.4.9"
NEW = "needs torch 3.9 or earlier, got 3.10.0"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ((3, 4, 9), OLD),
        ((3, 5), None),
        ((3, 5, 0), None),
        ((3, 9, 1), None),
        ((3, 10, 0), NEW),
        ((4,), "needs torch 3.9 or earlier, got 4"),
    ],
)
def test_version_of_the_package_lies_within_what_is_needed(installed, version, reason):
    installed(*version)
    wants = needs(package="torch.nn", package_min=(3, 5), package_max=(3, 9))
    assert registry.unmet(wants, CALL) == reason


def test_version_is_that_of_the_package_itself(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0a0+git12")
    assert registry._version.__wrapped__("torch") == (2, 13, 0)


def test_missing_package_is_named_before_its_version(installed):
    installed(1)
    wants = needs(package="no_such_package", package_min=(3, 5))
    assert registry.unmet(wants, CALL) == "package no_such_package is missing"


def test_auto_passes_over_a_wrong_version_and_says_so_once(installed, caplog):
    installed(3, 4, 9)
    add("fast", 10, needs(package="torch", package_min=(3, 5)))
    add("fast", 11, needs(package="torch", package_min=(3, 5)))
    slow = add("slow", 30)
    for k in (32, 64, 96):
        assert registry.select(OP, Call("scheme", CPU, n=48, k=k)) is slow
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == [f"{OP}: without its fast backend, which {OLD}"]


@pytest.mark.parametrize(
    "other",
    [
        {"k_multiple": 64},
        {"devices": frozenset({"cuda"})},
        {"package": "no_such_package"},
        {"measured": ((9, 0), (10, 0))},
    ],
)
def test_version_that_is_not_all_that_is_wrong_is_not_mentioned(
    installed, monkeypatch, caplog, other
):
    installed(3, 4, 9)
    monkeypatch.setattr(registry, "capability", lambda device: (8, 0))
    add("fast", 10, needs(**{"package": "torch", "package_min": (3, 5), **other}))
    add("slow", 30)
    assert registry.select(OP, CALL).name == "slow"
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_backend_of_a_wrong_version_raises_when_named(installed, caplog):
    installed(3, 4, 9)
    add("fast", 10, needs(package="torch", package_min=(3, 5)))
    add("slow", 30)
    with pytest.raises(NoBackendError, match=f"fast: {OLD}"):
        registry.select(OP, CALL, "fast")
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_version_is_read_without_a_break_in_a_compiled_graph(caplog):
    add("fast", 10, needs(package="torch", package_min=(999,)))
    add("slow", 30)

    def run(x):
        return x + 1 if registry.select(OP, CALL).name == "slow" else x

    torch._dynamo.reset()
    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


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
