"""The command line in a process forked from this one, which need not import torch again."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator

from lowbit.cli import main

STDOUT, STDERR = 1, 2
TIMEOUT_S = 60


@contextlib.contextmanager
def forked(argv: list[str], prepare: Callable[[], None]) -> Iterator[tuple]:
    """Yield (process, its stdout, its stderr) of a command; afterwards it has ended.

    prepare: called first, in that process.
    """
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    ends = (out_end, err_end)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(argv, prepare, *ends))
    process.start()
    for end in ends:
        os.close(end)
    with open(out, "rb") as stdout, open(err, "rb") as stderr:
        try:
            yield process, stdout, stderr
            process.join(TIMEOUT_S)
        finally:
            if process.is_alive():
                process.kill()
            process.join()


def _run(argv: list[str], prepare: Callable[[], None], out_end: int, err_end: int) -> None:
    os.dup2(out_end, STDOUT)
    os.dup2(err_end, STDERR)
    # pytest has others, which write elsewhere.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    prepare()
    sys.exit(main(argv))
