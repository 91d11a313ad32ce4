"""When a kernel may start before the one ahead of it has ended, and how the product says so."""

from types import SimpleNamespace

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


class Compiled:
    """A compiled kernel that notes how it is run."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.ran = []

    def run(self, *given):
        self.ran.append(given)

    def __getitem__(self, grid):
        return lambda *given: self.ran.append((grid, given))


class Kernel:
    """A kernel that Triton compiles when it is first called."""

    def __init__(self):
        self.compiled = Compiled()
        self.calls = 0

    def fn(self):
        """What the kernel was made of."""

    def __getitem__(self, grid):
        def call(*given, **options):
            self.calls += 1
            return self.compiled

        return call


@pytest.fixture
def kernel(monkeypatch):
    """A kernel, and a driver whose stream is 7."""
    from triton.runtime import driver

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


def start(kernel, key="key") -> None:
    launch.launch(kernel, 5, ("x", 3), {"num_warps": 4}, key, torch.device("cpu"))


def test_second_launch_asks_triton_for_nothing(kernel):
    for _ in range(3):
        start(kernel)
    assert kernel.calls == 1
    assert (
        kernel.compiled.ran == [(5, 1, 1, 7, "function", "metadata", None, None, None, "x", 3)] * 2
    )
    start(kernel, "another key")
    assert kernel.calls == 2


def test_hooks_of_a_profiler_are_triton_s_to_call(kernel):
    from triton import knobs

    hook = print
    start(kernel)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        start(kernel)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert kernel.compiled.ran == [((5, 1, 1), ("x", 3))]
