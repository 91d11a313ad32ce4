"""When a kernel may start before the one ahead of it has ended, and how the product says so."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton, whose launch options these are, is missing")

from triton.backends.nvidia import compiler

from lowbit.ops import launch
from lowbit.ops.scaled_mm import triton as product
from lowbit.ops.scaled_mm.tiles import Tile

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that pretends a GPU of some capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(launch, "capability", lambda device: capability or None)

    launch.dependent.cache_clear()
    yield pretend
    launch.dependent.cache_clear()


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_hopper_and_later_may_start_early(gpu, capability):
    gpu(*capability)
    assert launch.dependent(CUDA) == {"launch_pdl": True}


@pytest.mark.parametrize("capability", [(), (8, 0), (8, 9)])
def test_elsewhere_a_kernel_waits_its_turn(gpu, capability):
    gpu(*capability)
    assert launch.dependent(CUDA) == {}


def test_a_triton_that_does_not_know_the_option_is_not_given_it(gpu, monkeypatch):
    gpu(9, 0)
    fields = dict(compiler.CUDAOptions.__dataclass_fields__)
    del fields["launch_pdl"]
    monkeypatch.setattr(compiler.CUDAOptions, "__dataclass_fields__", fields)
    assert launch.dependent(CUDA) == {}


def launched(monkeypatch, early: bool, m: int, n: int = 5) -> tuple[dict, dict]:
    """The product's arguments by name, and the options it is launched with."""
    from lowbit.ops.scaled_mm.kernel import scaled_mm_kernel

    given = []
    monkeypatch.setattr(product, "dependent", lambda device: {"launch_pdl": True} if early else {})
    monkeypatch.setattr(product, "launch", lambda *arguments: given.append(arguments))
    a, b, one = torch.zeros(m, 32).char(), torch.zeros(n, 32).char(), torch.ones(1)
    out = torch.empty(m, n)
    product.run_tile(out, a, b, one, one, None, None, None, Tile(16, 32, 32), 3)
    ((_, _, arguments, options, _, _),) = given
    return dict(zip(scaled_mm_kernel.arg_names, arguments, strict=True)), options


@pytest.mark.parametrize("early", [True, False])
def test_product_waits_where_it_starts_early_and_only_there(monkeypatch, early):
    """The option of the launch and the constant of the kernel go together."""
    arguments, options = launched(monkeypatch, early, 3)
    assert arguments["PDL"] == early
    assert options.get("launch_pdl", False) == early


@pytest.mark.parametrize(
    ("early", "m", "fetched"), [(True, 3, True), (True, 2000, False), (False, 3, False)]
)
def test_weight_is_fetched_ahead_for_few_tokens(monkeypatch, early, m, fetched):
    arguments, _ = launched(monkeypatch, early, m)
    assert (arguments["weight"] is not None) == fetched


def test_weight_that_the_cache_does_not_hold_is_not_fetched_ahead(monkeypatch):
    monkeypatch.setattr(product, "PREFETCH_BYTES", 5 * 32)
    assert launched(monkeypatch, True, 3, n=5)[0]["weight"] is not None
    assert launched(monkeypatch, True, 3, n=6)[0]["weight"] is None
