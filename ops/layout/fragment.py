"""What each thread holds of a wgmma of 64 rows: accumulator and A operand, from PTX's tables.

Source: PTX ISA, "Register Fragments for wgmma.mma_async": D of m64nN; A of m64k16 and m64k32.
"""

from dataclasses import dataclass

LANES = 32
WARP_ROWS = 16
# Keys whose order is permuted among themselves.
GROUP = 16


@dataclass(frozen=True)
class Element:
    """One element of a tile: its row, and its column (of an A operand: its place along K)."""

    row: int
    column: int


def _row(thread: int, half: int) -> int:
    return thread // LANES * WARP_ROWS + thread % LANES // 4 + 8 * half


def accumulator(thread: int, register: int) -> Element:
    """Return the element in a 32-bit register of the accumulator; thread: of 128."""
    group, inside = divmod(register, 4)
    return Element(_row(thread, inside // 2), group * 8 + thread % 4 * 2 + inside % 2)


def operand_16bit(thread: int, step: int, register: int, half: int) -> Element:
    """Return the element in half a register (of 4) of the A operand of the step-th 16 along K."""
    column = step * 16 + register // 2 * 8 + thread % 4 * 2 + half
    return Element(_row(thread, register % 2), column)


def operand_8bit(thread: int, step: int, register: int, byte: int) -> Element:
    """Return the element in a byte of a register (of 4) of the A operand of the step-th 32."""
    column = step * 32 + register // 2 * 16 + thread % 4 * 4 + byte
    return Element(_row(thread, register % 2), column)


def key_order() -> tuple[int, ...]:
    """Return the key that stands at each place of 16, for P·V in 8 bits without a shuffle.

    S comes as an accumulator whose columns are keys; P = f(S) goes as an A operand whose places
    along K are V's. A thread packs its columns in the order in which it holds them, so the place
    that an operand's byte has is given to the key whose column the thread has there.
    """
    order = [0] * GROUP
    for thread in range(4):
        for byte in range(4):
            # Registers 0 and 1 are the row's in the first 8 columns, 4 and 5 in the next 8.
            register = byte // 2 * 4 + byte % 2
            place = operand_8bit(thread, 0, 0, byte).column
            order[place] = accumulator(thread, register).column
    return tuple(order)
