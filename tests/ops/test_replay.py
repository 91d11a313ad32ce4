"""A call that was prepared once launches the same for other tensors, and keeps none of them."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch

from lowbit.ops import launch, replay, tuning
from tests.ops.recorded import only_launches

CPU = torch.device("cpu")


@dataclass
class Descriptor:
    """What Triton's description of a tensor looks like."""

    base: torch.Tensor
    block_shape: tuple[int, int]


@pytest.fixture
def launched(monkeypatch):
    """Arguments of each launch, prepared or again."""
    found = []

    def first(kernel, programs, arguments, options, key, device):
        found.append((programs, list(arguments)))
        return kernel

    def again(compiled, programs, arguments, device):
        assert compiled == "kernel"
        assert device == CPU
        found.append((programs, arguments))

    monkeypatch.setattr(launch, "launch", first)
    monkeypatch.setattr(launch, "again", again)
    return found


@pytest.fixture
def prepared():
    """How often the function below was run."""
    return []


@pytest.fixture
def run(prepared):
    @replay.replayed
    def run(x, pair, factor, copied=False):
        prepared.append(factor)
        rows, columns = x.shape
        between = replay.empty((rows,), torch.float32, x.device)
        out = replay.empty((columns, rows), x.dtype, x.device)
        source = x.clone() if copied else x
        replay.launch("kernel", rows, (source, between, None, factor), {}, "key", x.device)
        arguments = (Descriptor(between, (2, 4)), *pair, out, x.stride(0))
        replay.launch("kernel", columns, arguments, {}, "key", x.device)
        return out, x, None

    return run


def test_second_call_launches_the_same_for_other_tensors(run, prepared, launched):
    for _ in range(3):
        x, bias = torch.zeros(3, 5), torch.zeros(5)
        launched.clear()
        out, same, nothing = run(x, (bias, None), 2)
        assert same is x
        assert nothing is None
        assert (out.shape, out.dtype) == ((5, 3), x.dtype)
        (rows, first), (columns, second) = launched
        assert (rows, columns) == (3, 5)
        assert first[0] is x
        assert first[2:] == [None, 2]
        assert first[1].shape == (3,)
        assert type(second[0]) is Descriptor
        assert second[0].base is first[1]
        assert second[0].block_shape == (2, 4)
        assert second[1] is bias
        assert second[2] is None
        assert second[3] is out
        assert second[4] == 5
    assert prepared == [2]


@pytest.mark.parametrize(
    "other",
    [
        (torch.zeros(3, 5).half(), (torch.zeros(5), None), 2),
        (torch.zeros(4, 5), (torch.zeros(5), None), 2),
        (torch.zeros(3, 10)[:, ::2], (torch.zeros(5), None), 2),
        (torch.zeros(16)[1:].view(3, 5), (torch.zeros(5), None), 2),
        (torch.zeros(3, 5), (torch.zeros(5), torch.zeros(1)), 2),
        (torch.zeros(3, 5), (torch.zeros(5), None), 3),
    ],
    ids=["dtype", "shape", "strides", "alignment", "one more", "number"],
)
def test_call_that_differs_is_prepared_for_itself(run, prepared, launched, other):
    run(torch.zeros(3, 5), (torch.zeros(5), None), 2)
    run(*other)
    assert len(prepared) == 2
    run(*other)
    assert len(prepared) == 2


@pytest.mark.parametrize("numbers", [(1, True, 1.0), (0, False, 0.0, -0.0)], ids=str)
def test_numbers_that_are_equal_are_not_the_same(run, prepared, launched, numbers):
    for _ in range(2):
        for number in numbers:
            run(torch.zeros(3, 5), (None, None), number)
            found = launched[-2][1][3]
            assert type(found) is type(number) and str(found) == str(number)
    assert len(prepared) == len(numbers)


def test_not_a_number_is_prepared_once(run, prepared, launched):
    for _ in range(3):
        run(torch.zeros(3, 5), (None, None), float("nan"))
    assert len(prepared) == 1


def test_function_that_only_launches_passes_for_one(run, launched):
    with only_launches() as counts:
        run(torch.zeros(3, 5), (torch.zeros(5), None), 2)
        run(torch.zeros(3, 5), (torch.zeros(5), None), 2, True)
        run(torch.zeros(3, 5), (torch.zeros(5), None), 2)
    assert counts == [2, 2]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (lambda x, out: out.zero_(), "zero_.default of a tensor that"),
        (lambda x, out: out[:1].add_(1), "add_.Tensor of a tensor that"),
        (lambda x, out: x + out, "add.Tensor of a tensor that"),
        (lambda x, out: x.mul_(2), "mul_.Tensor writes to an argument"),
        (lambda x, out: torch.add(x, x, out=x), "add.out writes to an argument"),
    ],
)
def test_function_that_does_more_is_found_out(launched, more, told):
    @replay.replayed
    def wrong(x):
        out = replay.empty(x.shape, x.dtype, x.device)
        replay.launch("kernel", 1, (x, out), {}, "key", x.device)
        more(x, out)
        return out

    with only_launches(), pytest.raises(AssertionError, match=told):
        wrong(torch.ones(2))


def test_copy_of_an_argument_is_made_each_time(run, prepared, launched):
    for value in (1.0, 2.0):
        run(torch.full((3, 5), value), (torch.zeros(5), None), 2, True)
        assert launched[-2][1][0].eq(value).all()
    assert len(prepared) == 2


def test_one_tensor_in_two_places_is_no_rule_for_two_tensors(run, prepared, launched):
    one, two = torch.zeros(5), torch.zeros(5)
    for pair in ((one, one), (one, two), (one, one), (two, one)):
        run(torch.zeros(3, 5), pair, 2)
        assert launched[-1][1][1] is pair[0]
        assert launched[-1][1][2] is pair[1]
    assert len(prepared) == 2


def test_no_tensor_is_kept(run, launched):
    kept = []
    for _ in range(2):
        x = torch.zeros(3, 5)
        kept.append(weakref.ref(x))
        kept.append(weakref.ref(run(x, (None, None), 2)[0]))
        del x
        launched.clear()
        gc.collect()
    assert [reference() for reference in kept] == [None] * 4


def test_what_was_prepared_is_forgotten_with_what_was_tuned(run, prepared, launched):
    for _ in range(2):
        run(torch.zeros(3, 5), (None, None), 2)
        tuning.forget()
    assert len(prepared) == 2


def test_call_that_fails_is_not_remembered(prepared, launched):
    @replay.replayed
    def fail(x):
        prepared.append(x)
        raise ValueError("bad")

    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            fail(torch.zeros(1))
    assert len(prepared) == 2
    assert replay._here.record is None


def test_call_during_which_entries_are_forgotten_is_prepared_again(launched):
    prepared = []

    @replay.replayed
    def run(x):
        prepared.append(1)
        if len(prepared) == 1:
            tuning.forget()
        out = replay.empty(x.shape, x.dtype, x.device)
        replay.launch("kernel", 1, (x, out), {}, "key", x.device)
        return out

    for _ in range(3):
        run(torch.ones(2))
    assert len(prepared) == 2 and len(launched) == 3


class ByAddress:
    """A compiled kernel that takes addresses of what is between two launches."""

    by_address = True


def test_what_is_between_kernels_is_one_piece_of_memory(run, prepared, launched, monkeypatch):
    kernel = ByAddress()
    again = []
    monkeypatch.setattr(launch, "launch", lambda *given: kernel)
    monkeypatch.setattr(launch, "again", lambda compiled, *given: again.append(given[1]))

    @replay.replayed
    def two(x):
        sums, codes, out = (replay.empty((n,), torch.float32, x.device) for n in (3, 1000, 4))
        room = replay.empty((5000,), torch.uint8, x.device)
        replay.launch("kernel", 1, (x, sums, codes, None, 7), {}, "key", x.device)
        replay.launch("kernel", 1, (codes, room, out), {}, "key", x.device)
        return out

    two(torch.zeros(2))
    given = torch.zeros(2)
    out = two(given)
    (x, sums, codes, none, seven), (codes_again, room, made) = again
    assert x is given and made is out and (none, seven) == (None, 7)
    assert type(sums) is type(codes) is type(room) is int and codes == codes_again
    # The sums are not read any more where the room is.
    assert sums == room and codes == room + 5120


def test_large_pieces_and_unused_ones_stay_apart(launched, monkeypatch):
    again = []
    monkeypatch.setattr(launch, "launch", lambda *given: ByAddress())
    monkeypatch.setattr(launch, "again", lambda compiled, *given: again.append(given[1]))
    monkeypatch.setattr(replay, "MOST_BETWEEN", 4000)

    @replay.replayed
    def one(x, n):
        large, small, _ = (replay.empty((i,), torch.uint8, x.device) for i in (4001, n, 9))
        replay.launch("kernel", 1, (x, large, small), {}, "key", x.device)
        return (None,)

    for n in (4000, 0):
        for _ in range(2):
            assert one(torch.zeros(2), n) == (None,)
        large, small = again[-1][1:]
        assert large.shape == (4001,) and type(small) is int and (small == 0) == (n == 0)


def test_only_what_is_used_at_once_is_side_by_side():
    sizes = torch.randint(0, 3000, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    spans = {i: replay._Span(n, i % 7, i % 7 + i % 3) for i, n in enumerate(sizes)}
    starts, size = replay.packed(spans)
    for i, a in spans.items():
        assert starts[i] % replay.BETWEEN_ALIGNMENT == 0 and starts[i] + a.size <= size
        for j, b in spans.items():
            at_once = i < j and a.first <= b.last and b.first <= a.last
            assert not at_once or starts[i] + a.size <= starts[j] or starts[j] + b.size <= starts[i]
    # As much as is used at any time, and some gaps.
    most = max(sum(s.size for s in spans.values() if s.first <= n <= s.last) for n in range(9))
    assert most <= size <= 1.25 * most
    assert replay.packed({}) == ({}, 0)
