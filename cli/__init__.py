"""The command line: `lowbit COMMAND …`, one command per file.

Every module here with a `NAME` is a command: it has add_arguments(parser) and run(args) -> exit
code, and imports what needs torch inside run, so that `--help` is quick.

Exit codes: 0 done; 1 done, and the answer is bad news (`inspect`); 2 an error, told in one line on
stderr; 130 and 143 stopped by Ctrl-C and by SIGTERM.
"""

import argparse
import contextlib
import importlib
import pkgutil
import signal
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NoReturn

ERROR = 2
SIGNAL_BASE = 128


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; raised so that what was begun is cleaned up."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = SIGNAL_BASE + number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(ERROR, f"lowbit: {message}\n")


def commands() -> dict[str, ModuleType]:
    """Return the modules of all commands by name."""
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    return {m.NAME: m for m in modules if hasattr(m, "NAME")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names and return its exit code; None: the process's arguments.

    Raises SystemExit for `--help` and for arguments that do not parse, as argparse does.
    """
    args = _parser().parse_args(argv)
    try:
        with _stoppable():
            return args.run(args)
    except Stopped as stop:
        return _fail(f"stopped by {stop}; nothing half-written is left", stop.exit_code)
    except (ValueError, OSError, RuntimeError) as error:
        if args.debug or not _is_told(error):
            raise
        return _fail(" ".join(str(error).split()) or type(error).__name__, ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lowbit", description="Diffusion transformers in 8 and 4 bits.")
    debug = {"action": "store_true", "help": "on an error, show where it happened"}
    parser.add_argument("--debug", default=False, **debug)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in commands().items():
        summary, _, details = (module.__doc__ or "").partition("\n")
        sub = subparsers.add_parser(name, help=summary, description=f"{summary}\n{details}")
        sub.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(sub)
        # Without a default of its own: it would undo a --debug that stands before the command.
        sub.add_argument("--debug", default=argparse.SUPPRESS, **debug)
        sub.set_defaults(run=module.run)
    return parser


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Raise Stopped on the first SIGINT or SIGTERM, and let nothing disturb the cleaning up."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number, frame):
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    # A process that runs in the background of a shell ignores SIGINT, and is to go on doing so.
    before = {n: signal.getsignal(n) for n in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_told(error: Exception) -> bool:
    """Return whether the message alone tells the user what to do; a fault of ours needs a trace."""
    if not isinstance(error, RuntimeError):
        return True
    import torch

    from ..ops.registry import NoBackendError

    return isinstance(error, (NoBackendError, torch.OutOfMemoryError))


def _fail(message: str, code: int) -> int:
    print(f"lowbit: {message}", file=sys.stderr)
    return code
