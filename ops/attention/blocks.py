"""Which attentions of a model are meant: by what they look at, and by block."""

import re

LAYERS = ("self", "cross", "all")
_RANGE = re.compile(r"(\d+)(?:-(\d*))?")


def parse_blocks(text: str) -> tuple[range, ...] | None:
    """Return the ranges that "0-2, 5" stands for, ends included; None, for all blocks, of "".

    "38-" has no end. Raises ValueError for anything else, and for ends before their start.
    """
    if not text.strip():
        return None
    ranges = []
    for part in text.split(","):
        found = _RANGE.fullmatch("".join(part.split()))
        if not found:
            raise ValueError(f"blocks: {part.strip()!r} is neither a block nor a range like 0-2")
        first, last = int(found[1]), found[2]
        end = first if last is None else int(last or 2**31)
        if end < first:
            raise ValueError(f"blocks: {part.strip()} ends before it starts")
        ranges.append(range(first, end + 1))
    return tuple(ranges)
