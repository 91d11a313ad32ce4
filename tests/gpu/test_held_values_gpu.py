"""V in integers: held until its range is known, read twice, or packed again: always the same."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowbit.ops import tuning
from lowbit.ops.attention import prepare, prepass
from lowbit.ops.attention.modes import MODES
from lowbit.ops.cuda import nvrtc
from tests.ops.cuda.compiled import fields_of

# Of a head's state: how many blocks have told; the bit above is AGAIN.
TOLD = (1 << 31) - 1
STATE = fields_of(prepass.source("survey.cu"), "Params").index("v_state")
WAYS = {"held": {}, "read twice": {"LEAST_HELD": 9}, "given up": {"PATIENCE": 0}}


@pytest.fixture(autouse=True)
def _compiler():
    if nvrtc.missing():
        pytest.skip(nvrtc.missing())


def inputs(b: int, heads: int, keys: int, d: int, seed: int = 0, dtype=torch.bfloat16) -> tuple:
    """What `prepare` takes for int8; the first and the last head have a value far away each."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(b, length, heads, d, generator=generator, device="cuda", dtype=dtype)
        for length in (128, keys, keys)
    )
    v[:, keys // 2, 0, 5], v[:, keys - 1, -1, 6] = 300, -torch.inf
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return q, k, v, 0.1, MODES["int8"], 4 if d == 128 else 1, d == 128, False


def fields(given: tuple) -> list[torch.Tensor]:
    """All that `prepare` gives, as bytes."""
    made = vars(prepare.prepare(*given)).values()
    return [x.contiguous().view(torch.uint8) for x in made if x is not None]


def traced(monkeypatch, given: tuple, **constants) -> tuple[list, set[str], torch.Tensor]:
    """`fields`, the kernels that were launched, and what they left of each head."""
    kernels, states = set(), []

    def launch(kernel, programs, arguments, *rest):
        kernels.add(kernel._name)
        states.append(arguments[STATE])
        return prepass_launch(kernel, programs, arguments, *rest)

    prepass_launch = prepass.launch
    with monkeypatch.context() as patch:
        patch.setattr(prepass, "launch", launch)
        for name, value in constants.items():
            patch.setattr(prepass, name, value)
        tuning.forget()
        found = fields(given)
    tuning.forget()
    return found, kernels, states[-1].clone()


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("b", "heads", "keys", "d"),
    [(1, 2, 1, 128), (2, 3, 129, 128), (1, 40, 3000, 128), (2, 2, 20001, 64), (1, 3, 75600, 128)],
)
def test_all_ways_give_the_same(monkeypatch, b, heads, keys, d, dtype):
    given = inputs(b, heads, keys, d, dtype=dtype)
    found = {name: traced(monkeypatch, given, **constants) for name, constants in WAYS.items()}
    want, kernels, _ = found["read twice"]
    assert {"see_values", "pack_values"} <= kernels and "hold_values" not in kernels
    held = prepass._held(given[2].device, d)
    blocks = prepass.count(prepass.count(keys), held)
    for name in ("held", "given up"):
        got, kernels, state = found[name]
        assert "hold_values" in kernels and "see_values" not in kernels
        assert same(got, want), name
        # All blocks have told their range, whether they waited or not.
        assert ((state & TOLD) == blocks).all()
        assert (state < 0).any() == (name == "given up" and blocks > 1)


@pytest.mark.parametrize("keys", [9000, 75600])
def test_streams_that_share_the_gpu_wait_or_give_up(keys):
    """Two of them, whose heads do not fit beside each other where there are many keys."""
    given = [inputs(1, 6, keys, 128, seed=n) for n in range(2)]
    want = [fields(x) for x in given]
    torch.cuda.synchronize()

    def work(x, expected) -> int:
        with torch.cuda.stream(torch.cuda.Stream()):
            return sum(same(fields(x), expected) for _ in range(20))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, given, want)) == [20, 20]
