import pytest
import torch

from lowbit.ops.rounding import GRIDS, round_stochastic

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SEEDS = range(1, 9)


def grid_values(grid: torch.dtype | str) -> torch.Tensor:
    """Return every finite value of `grid`, in order."""
    if grid == "e2m1":
        positive = E2M1
    else:
        codes = torch.arange(128, dtype=torch.uint8).view(grid).float()
        positive = codes[codes.isfinite()]
    return torch.cat([-positive.flip(0), positive])


@pytest.fixture(params=GRIDS, ids=str)
def grid(request):
    return request.param


def test_values_of_the_grid_stay(grid):
    values = grid_values(grid)
    for seed in SEEDS:
        assert torch.equal(round_stochastic(values, grid, seed), values)


def test_value_of_the_grid_stays_in_millions_of_trials(grid):
    """Added to the value, a random number just below 1 would round it up, once in two millions."""
    value = grid_values(grid)[-2]
    assert torch.equal(round_stochastic(value.expand(1 << 21), grid, seed=1).unique(), value[None])


def test_results_are_the_two_neighbours(grid):
    values = grid_values(grid)
    middle = (values[:-1] + values[1:]) / 2
    got = torch.stack([round_stochastic(middle, grid, seed) for seed in SEEDS])
    assert ((got == values[:-1]) | (got == values[1:])).all()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_mean_is_the_value(grid, part):
    """Between each two neighbours, within five standard deviations of a mean of 4096 trials."""
    values = grid_values(grid)
    low, step = values[:-1], values[1:] - values[:-1]
    trials = 4096
    want = (low + part * step).expand(trials, -1)
    mean = round_stochastic(want, grid, seed=1).double().mean(dim=0)
    deviation = step * (part * (1 - part) / trials) ** 0.5
    assert ((mean - want[0]).abs() <= 5 * deviation + 1e-6 * want[0].abs()).all()


def test_values_beyond_the_largest_clamp(grid):
    largest = grid_values(grid)[-1].item()
    x = torch.tensor([largest * 1.01, 1e30, torch.inf, -largest * 1.01, -torch.inf])
    for seed in SEEDS:
        got = round_stochastic(x, grid, seed)
        assert torch.equal(got, torch.tensor([1.0, 1, 1, -1, -1]) * largest)


def test_nan_stays_nan_and_alone(grid):
    got = round_stochastic(torch.tensor([1.0, torch.nan, -1.0]), grid, seed=1)
    assert got.isnan().tolist() == [False, True, False]


def test_zero_stays_zero(grid):
    assert not round_stochastic(torch.zeros(1000), grid, seed=1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 5)])
def test_any_shape_and_dtype_gives_float32(grid, dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    before = x.clone()
    got = round_stochastic(x, grid, seed=1)
    assert (got.dtype, got.shape) == (torch.float32, shape)
    assert torch.equal(x, before)


def test_strides_do_not_matter(grid):
    x = torch.linspace(-3, 3, 24).reshape(4, 6)
    want = round_stochastic(x, grid, seed=1)
    assert torch.equal(round_stochastic(x.t().contiguous().t(), grid, seed=1), want)


def test_seed_decides(grid):
    x = torch.linspace(0.1, 5.9, 1000)
    first, again, other = (round_stochastic(x, grid, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_caller_s_random_numbers_are_left_alone(grid):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    round_stochastic(torch.ones(100), grid, seed=1)
    assert torch.equal(torch.rand(3), want)
