"""Backends of an operation and their needs, as data.

An operation is a folder of `ops/`. Each backend file registers what it can run (`Backend`) together
with what it needs (`Needs`); `select` picks the first one whose needs hold, or the one that the
caller named, and raises `NoBackendError` with every backend's reason when none fits.
"""

import functools
import importlib
import importlib.util
import logging
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import tuning

logger = logging.getLogger(__name__)

SelfTest = Callable[[torch.device], str | None]
KERNEL = "kernel"
# `Needs.measured` of what `auto` takes nowhere: it runs when named.
BY_NAME = ((0, 0), (0, 0))
UNKNOWN = "does not know"


class NoBackendError(RuntimeError):
    """No backend can run a call; the message lists each backend's reason."""


@dataclass(frozen=True)
class Needs:
    """What a backend needs to run. Empty fields ask for nothing.

    capability: the least one. measured: `auto` takes the backend from the first capability on,
    below the second; elsewhere it runs when named; BY_NAME: nowhere. few: `auto` takes
    it for few rows (True) or for many (False) only. package: a module to import, dots allowed.
    package_min, package_max: the first and the last version of it that will do; (3, 9) is 3.9.1
    too. Where `auto` passes over a backend for its version alone, it says so once. self_test: asked
    once on each device, gives a reason or None; a dict: one for each K, which are kernels of their
    own.
    """

    schemes: frozenset[str]
    devices: frozenset[str] = frozenset()
    capability: tuple[int, int] | None = None
    measured: tuple[tuple[int, int], tuple[int, int]] | None = None
    few: bool | None = None
    k_multiple: int = 1
    n_multiple: int = 1
    k_max: int | None = None
    package: str | None = None
    package_min: tuple[int, ...] | None = None
    package_max: tuple[int, ...] | None = None
    self_test: SelfTest | dict[int, SelfTest] | None = field(default=None, compare=False)


class Call(NamedTuple):
    """What is known of a call before it runs: the weight's scheme and shape [N, K], the device.

    m: the bucket of its rows where `lowbit tune` measured the weight (`tuning.bucket_if_tuned`).
    few: whether its rows are few, or what comes with them is nothing that kernels for many take,
    for operations that ask it (`Needs.few`).
    """

    scheme: str
    device: torch.device
    n: int
    k: int
    m: int | None = None
    few: bool | None = None


@dataclass(frozen=True)
class Backend:
    """One way to run an operation. `rank` orders `auto`: lower is tried first.

    run_quantized: of linear layers, `run` with a `QuantizedActivation`; without it one is
    dequantized first. quantizes: `run_quantized` runs floats too, which are quantized before it.
    fuses: `run_quantized` takes `low_rank`, `gate` and `residual`, of `scaled_mm`. projects: the
    low-rank term may come as a `Down` of `scaled_mm`, whose product with x is made within.
    launches: without a low-rank term `run_quantized` does nothing but what `replay.Plans` does
    again, for results of 16 bits.
    """

    op: str
    name: str
    rank: int
    needs: Needs
    run: Callable = field(compare=False)
    run_quantized: Callable | None = field(default=None, compare=False)
    quantizes: bool = False
    fuses: bool = False
    projects: bool = False
    launches: bool = False


_BACKENDS: dict[str, list[Backend]] = {}


def register(backend: Backend) -> None:
    """Add a backend; the list of its operation stays sorted by rank."""
    backends = _BACKENDS.setdefault(backend.op, [])
    backends.append(backend)
    backends.sort(key=lambda b: b.rank)


def backends(op: str) -> tuple[Backend, ...]:
    """Return the backends of `op`, in the order in which `auto` tries them."""
    return tuple(_BACKENDS.get(op, ()))


def discover(package: str) -> None:
    """Import every module of `package`, so that its backends register themselves.

    Not its kernels: they need a package that may be missing, and their backend imports them when
    it runs.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name != KERNEL:
            importlib.import_module(f"{package}.{module.name}")


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device, None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


# torch.compile, which sees through the cache, cannot trace an import, nor the search for one.
@functools.cache
@torch.compiler.assume_constant_result
def _has_package(name: str) -> bool:
    parent = name.rpartition(".")[0]
    if parent and not _has_package(parent):
        return False
    return importlib.util.find_spec(name) is not None


@functools.cache
@torch.compiler.assume_constant_result
def _version(name: str) -> tuple[int, ...]:
    """Return the numbers of an installed package's version: (3, 6, 0) of 3.6.0+git1234."""
    numbers = re.match(r"\d+(\.\d+)*", importlib.import_module(name).__version__)
    return tuple(int(number) for number in numbers[0].split("."))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _wrong_version(needs: Needs) -> str | None:
    """Return why the version of an installed package will not do, or None."""
    if not (needs.package_min or needs.package_max) or not _has_package(needs.package):
        return None
    name = needs.package.partition(".")[0]
    has = _version(name)
    if needs.package_min and has < needs.package_min:
        return f"needs {name} {_dotted(needs.package_min)} or later, got {_dotted(has)}"
    if needs.package_max and has[: len(needs.package_max)] > needs.package_max:
        return f"needs {name} {_dotted(needs.package_max)} or earlier, got {_dotted(has)}"
    return None


@functools.cache
@torch.compiler.assume_constant_result
def _self_test(test: SelfTest, device: torch.device) -> str | None:
    # A compiler, whose tensors have no values, may be the first to ask.
    with _disable_current_modes():
        return test(device)


def unmet(needs: Needs, call: Call) -> str | None:
    """Return why `needs` do not hold for `call`, or None when they do."""
    if call.scheme not in needs.schemes:
        return f"{UNKNOWN} {call.scheme}"
    if needs.devices and call.device.type not in needs.devices:
        return f"needs a device of {sorted(needs.devices)}, got {call.device.type}"
    if needs.package and not _has_package(needs.package):
        return f"package {needs.package} is missing"
    has = capability(call.device)
    if needs.capability and has is not None and has < needs.capability:
        return f"needs compute capability {needs.capability}, got {has}"
    if call.k % needs.k_multiple:
        return f"K={call.k} is not a multiple of {needs.k_multiple}"
    if call.n % needs.n_multiple:
        return f"N={call.n} is not a multiple of {needs.n_multiple}"
    if needs.k_max and call.k > needs.k_max:
        return f"K={call.k} is above {needs.k_max}"
    wrong, test = _wrong_version(needs), needs.self_test
    if isinstance(test, dict):
        test = test.get(call.k)
    return wrong if wrong or not test else _self_test(test, call.device)


def _unmeasured(needs: Needs, call: Call) -> str | None:
    """Return why `auto` leaves a backend out that could run, or None."""
    if needs.few is not None and needs.few != call.few:
        return f"for {'few' if needs.few else 'many'} rows, runs when named"
    has = capability(call.device)
    if needs.measured is None or has is None or needs.measured[0] <= has < needs.measured[1]:
        return None
    return f"not measured on compute capability {has}, runs when named"


@functools.cache
def _warn(text: str) -> None:
    logger.warning("%s", text)


def _say_version(backend: Backend, call: Call, reason: str) -> None:
    """Warn, once, when nothing but a version keeps `auto` from a backend."""
    if torch.compiler.is_compiling() or _unmeasured(backend.needs, call):
        return
    if reason == _wrong_version(backend.needs):
        _warn(f"{backend.op}: without its {backend.name} backend, which {reason}")


def _log(text: str, *arguments) -> None:
    # torch.compile does not know how to log.
    if not torch.compiler.is_compiling():
        logger.info(text, *arguments)


def _measured_fastest(op: str, call: Call) -> Backend | None:
    """Return the backend that `lowbit tune` found faster than `auto`'s own choice, or None."""
    if call.m is None:
        return None
    key = (call.scheme, call.n, call.k, call.m)
    entry = tuning.lookup(op, tuning.gpu(call.device)).get(key)
    for backend in backends(op) if entry else ():
        if backend.name == entry.choice and unmet(backend.needs, call) is None:
            text = "%s %s [%d, %d], M up to %d, on %s: %s, measured faster than %s"
            _log(text, op, *key, call.device, backend.name, entry.instead_of)
            return backend
    return None


@tuning.cached
def select(op: str, call: Call, name: str = "auto") -> Backend:
    """Return the backend that runs `call`: the named one, or with `auto` the first that can.

    `auto` takes what `lowbit tune` measured to be faster, where it did and that can run.
    Raises ValueError for an unknown name and NoBackendError when the needs of the named backend,
    or of every backend, do not hold.
    """
    candidates = [b for b in backends(op) if name in ("auto", b.name)]
    if not candidates:
        known = sorted({b.name for b in backends(op)})
        raise ValueError(f"{op}: unknown backend {name!r}; known are auto, {', '.join(known)}")
    fastest = _measured_fastest(op, call) if name == "auto" else None
    if fastest:
        return fastest
    reasons = []
    for backend in candidates:
        reason = unmet(backend.needs, call)
        if name == "auto":
            if reason:
                _say_version(backend, call, reason)
            else:
                reason = _unmeasured(backend.needs, call)
        if reason is None:
            passed = f" ({'; '.join(reasons)})" if reasons else ""
            _log("%s %s on %s: %s%s", op, call.scheme, call.device, backend.name, passed)
            return backend
        # A backend registers once for each set of needs, of which many may not know the scheme.
        text = f"{backend.name}: {reason}"
        if text not in reasons:
            reasons.append(text)
    raise NoBackendError(f"{op} {call.scheme}: no backend fits. " + "; ".join(_said(reasons)))


def _said(reasons: list[str]) -> list[str]:
    """Return reasons, "name: reason", less that a backend's other needs do not know the scheme."""
    knows = {r.partition(":")[0] for r in reasons if UNKNOWN not in r}
    return [r for r in reasons if UNKNOWN not in r or r.partition(":")[0] not in knows]
