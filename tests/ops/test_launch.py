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


@pytest.mark.parametrize("early", [True, False])
def test_product_waits_where_it_starts_early_and_only_there(monkeypatch, early):
    """The option of the launch and the constant of the kernel go together."""
    from lowbit.ops.scaled_mm.kernel import scaled_mm_kernel

    option = {"launch_pdl": True} if early else {}
    launched = []
    monkeypatch.setattr(product, "dependent", lambda device: option)
    monkeypatch.setattr(product, "launch", lambda *given: launched.append(given))
    a, b, one = torch.zeros(3, 32).char(), torch.zeros(5, 32).char(), torch.ones(1)
    out = torch.empty(3, 5)
    product.run_tile(out, a, b, one, one, None, None, None, Tile(16, 32, 32), 3)
    ((_, _, arguments, options, _, _),) = launched
    constants = dict(zip(scaled_mm_kernel.arg_names, arguments, strict=True))
    assert constants["PDL"] == early
    assert options == {"num_warps": 4, "num_stages": 3, **option}
