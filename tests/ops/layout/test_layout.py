"""`ops/layout`: the algebra, the layouts of the seeds, P in shared memory, the order of keys."""

import itertools

import pytest

from lowbit.ops.layout import (
    Layout,
    Swizzle,
    accumulator,
    compose,
    key_order,
    operand_8bit,
    operand_16bit,
)

ROWS, COLUMNS, THREADS = 128, 128, 128
# Shared memory: banks of 4 bytes; 8 threads of 16 bytes are served at once.
BANK_BYTES, BANKS, AT_ONCE, WIDE = 4, 32, 8, 16
BF16_BYTES = 2


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (Layout((8, 4), (4, 1)), Layout(32, 1)),
        (Layout((8, 4), (4, 1)), Layout((4, 2), (8, 1))),
        (Layout((128, 16, 8), (64, 1, 16)), Layout((128, 64), (1, 128))),
        (Layout(((4, 8), 16), ((2, 100), 7)), Layout((16, 2, 4), (2, 32, 64))),
    ],
    ids=str,
)
def test_composition_is_one_layout_after_the_other(outer, inner):
    both = compose(outer, inner)
    assert both.addresses() == [outer(inner(i)) for i in range(inner.size)]


def test_uneven_composition_is_refused():
    with pytest.raises(ValueError, match="unevenly"):
        compose(Layout((6, 4), (4, 1)), Layout(3, 4))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_swizzle_is_its_own_inverse_and_keeps_16_byte_chunks(bits):
    swizzle = Swizzle(bits, 4, 3)
    for address in range(1 << 10):
        assert swizzle(swizzle(address)) == address
        assert swizzle(address) % WIDE == address % WIDE


def test_the_seed_compared_two_units_not_two_places():
    """The accumulator's stride of 65,536 counts FP32 columns of TMEM, the operand's 64 its own.

    Seed 2 prints ((128,128),1,1):((65536,1),0,0) for the accumulator, with a cosize of 8,323,200,
    and ((128,16),1,4):((64,1),0,16) for what it took for the A operand. A lane of TMEM is 65,536
    apart in the first; the second is dense: it numbers a tile in shared memory. Divided by the
    lane's stride and by the row's, the same (row, column) has the same place in both.
    """
    lanes, row = 65536, 64
    accumulator_layout = Layout(((128, 128), 1, 1), ((lanes, 1), 0, 0))
    operand = Layout(((128, 16), 1, 4), ((row, 1), 0, 16))
    assert accumulator_layout.cosize == 127 * lanes + 127 + 1 == 8_323_200
    assert operand.cosize == operand.size == 128 * 64
    for m, k in itertools.product((0, 1, 77, 127), (0, 15, 16, 63)):
        c = accumulator_layout((m, k), 0, 0)
        a = operand((m, k % 16), 0, k // 16)
        assert divmod(c, lanes) == divmod(a, row) == (m, k)


def test_the_seed_composition_is_the_first_64_columns():
    fragment = Layout((128, 128), (65536, 1))
    part = compose(fragment, Layout((128, 64), (1, 128)))
    assert (part.shape, part.stride) == ((128, 64), (65536, 1))
    # "128 loaded against 64 stored": 64 registers of FP32 are 128 numbers of bf16.
    assert 128 * BF16_BYTES == 64 * 4


def p_byte(m: int, k: int) -> int:
    """The byte of element (m, k) of P in the swizzled bf16 A operand, as facts state it."""
    chunk = ((2 * k % 128) // 16) ^ (m % 8)
    return k // 64 * 16384 + m * 128 + chunk * 16 + 2 * k % 16


def test_p_in_the_swizzled_operand_is_the_stated_formula():
    """sP ((128,16),1,(4,2)), regrouped to (M, K), under S<3,4,3> in bytes."""
    stride = ((64 * BF16_BYTES, 0), (BF16_BYTES, (32, 16384)))
    operand = Layout(((128, 1), (16, (4, 2))), stride, Swizzle(3, 4, 3))
    bytes_of = {}
    for m, k in itertools.product(range(ROWS), range(COLUMNS)):
        at = operand((m, 0), (k % 16, (k // 16 % 4, k // 64)))
        assert at == p_byte(m, k)
        bytes_of[at] = m, k
    assert len(bytes_of) == ROWS * COLUMNS
    assert max(bytes_of) == ROWS * COLUMNS * BF16_BYTES - BF16_BYTES


def test_a_thread_stores_its_row_of_p_in_16_conflict_free_stores():
    """Thread m has row m, as a TMEM load gives it: 128 bf16 are 16 stores of 16 bytes."""
    for store in range(COLUMNS * BF16_BYTES // WIDE):
        k = store * WIDE // BF16_BYTES
        for m in range(ROWS):
            places = [p_byte(m, k + i) for i in range(WIDE // BF16_BYTES)]
            assert places == list(range(places[0], places[0] + WIDE, BF16_BYTES))
            assert places[0] % WIDE == 0
        for first in range(0, THREADS, AT_ONCE):
            starts = [p_byte(m, k) // BANK_BYTES for m in range(first, first + AT_ONCE)]
            banks = {(start + i) % BANKS for start in starts for i in range(WIDE // BANK_BYTES)}
            assert len(banks) == BANKS


def packed_8bit(register: int, byte: int) -> int:
    """The accumulator register that softmax.cu packs into a byte of P's operand register."""
    quad, half = divmod(register, 2)
    return 8 * quad + (0, 1, 4, 5)[byte] + 2 * half


def test_accumulator_covers_the_tile_once():
    elements = {accumulator(t, r) for t in range(THREADS) for r in range(64)}
    assert elements == {accumulator(0, 0).__class__(m, n) for m in range(64) for n in range(128)}


def test_16_bit_operand_is_the_accumulator_as_it_is():
    for thread, step, register, half in itertools.product(range(128), range(8), range(4), (0, 1)):
        have = accumulator(thread, 8 * step + 2 * register + half)
        assert operand_16bit(thread, step, register, half) == have


def test_8_bit_operand_needs_the_keys_in_another_order():
    wrong = sum(
        operand_8bit(t, 0, r, b) != accumulator(t, packed_8bit(r, b))
        for t, r, b in itertools.product(range(THREADS), range(4), range(4))
    )
    assert wrong > 0


def test_with_v_in_the_order_of_keys_p_needs_no_shuffle():
    """Every byte that a thread packs stands, in the operand, at the place of its own key."""
    order = key_order()
    assert sorted(order) == list(range(16))
    for t, step, r, b in itertools.product(range(THREADS), range(4), range(4), range(4)):
        have = accumulator(t, packed_8bit(4 * step + r, b))
        place = operand_8bit(t, step, r, b)
        key = place.column // 16 * 16 + order[place.column % 16]
        assert (have.row, have.column) == (place.row, key)


def test_identity_p_returns_v_and_one_hot_p_selects_rows():
    """P·V as the tensor core does it: by place, on P packed by threads and V in key order."""
    order = key_order()
    v = [f"key {i}" for i in range(128)]
    stored = [v[place // 16 * 16 + order[place % 16]] for place in range(128)]
    for shift in (0, 1, 64, 77):
        hot = {(m, (m + shift) % 128) for m in range(64)}
        got = {}
        for t, step, r, b in itertools.product(range(THREADS), range(4), range(4), range(4)):
            have = accumulator(t, packed_8bit(4 * step + r, b))
            if (have.row, have.column) in hot:
                place = operand_8bit(t, step, r, b)
                got[place.row] = stored[place.column]
        assert got == {m: v[(m + shift) % 128] for m in range(64)}
