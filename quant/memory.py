"""Quantizing a layer on a device whose memory may not do: room is made, then the CPU takes it."""

import logging
from collections.abc import Callable

import torch
from comfy_kitchen.tensor import QuantizedTensor

from .formats import Format

logger = logging.getLogger(__name__)
NOTE = "quantized on the CPU, as the memory of {} ran out"


def empty_caches() -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quantize_within_memory(
    fmt: Format,
    weight: torch.Tensor,
    device: torch.device | str,
    tick: Callable[[], None] = lambda: None,
    make_room: Callable[[], None] = empty_caches,
    home: torch.device | None = None,
) -> tuple[QuantizedTensor, float, str]:
    """Return what `fmt.quantize_measured` gives, and a note where it was not done on `device`.

    weight: [N, K] float, anywhere. A device out of memory is given a second try after `make_room`;
    the arithmetic there takes few rows at a time anyhow, so that what is left to do without is the
    weight itself, and the CPU quantizes it. Its result is the same but for the last bits of sums.
    home: where the result is to lie; None: where it was made. Raises torch.OutOfMemoryError where
    the CPU has no memory, or `home`, which is given a second try too.
    """
    device = torch.device(device)
    for attempt in range(2):
        try:
            made, error = fmt.quantize_measured(weight.to(device), tick)
            return _moved(made, home, make_room), error, ""
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
            # Outside of `except`, whose traceback holds the tensors of the failed try.
            failed = attempt
        make_room()
        logger.info("LowBit: %s ran out of memory, try %d", device, failed + 1)
    note = NOTE.format(device)
    logger.warning("LowBit: a layer of %s was %s", tuple(weight.shape), note)
    made, error = fmt.quantize_measured(weight.cpu(), tick)
    return _moved(made, home, make_room), error, note


def _moved(made: QuantizedTensor, home: torch.device | None, make_room) -> QuantizedTensor:
    if home is None:
        return made
    try:
        return made.to(home)
    except torch.OutOfMemoryError:
        # Room is made outside of `except`, whose traceback may hold tensors.
        logger.info("LowBit: %s has no memory for a quantized layer", home)
    make_room()
    return made.to(home)
