"""What this machine has, and how every number format would run on it."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy_kitchen
import torch

from ..ops import cache_folder, registry, tuning, tuning_file
from ..ops.attention import OP as ATTENTION
from ..ops.attention import auto
from ..ops.attention.ways import SDPA
from ..ops.fp4_mm import OP as FOUR_BIT
from ..ops.linear import OP
from ..ops.linear.arithmetic import ARITHMETICS, AUTO, backend_named
from ..ops.linear.four_bit import GROUPS
from ..ops.scaled_mm import OP as PRODUCT
from . import arithmetic, formats

# Packages by module name, with the names under which they are published.
PACKAGES = {
    "triton": ("triton", "triton-windows", "pytorch-triton"),
    "sageattention": ("sageattention",),
    "flash_attn": ("flash-attn", "flash_attn"),
}
HOST_VERSION_FILE = "comfyui_version.py"
# A shape [N, K] that every backend's multiples divide.
N = K = 4096
TORCHS_OWN = "torch's own"


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees. memory_bytes: all of it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class KitchenBackend:
    """A backend of comfy-kitchen; reason: why it is off, or None."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class Host:
    """A ComfyUI; version: None where its version file cannot be read."""

    path: str
    version: str | None


@dataclass(frozen=True)
class FormatSupport:
    """How a format runs here, in words. unfit: backend → why it does not fit.

    arithmetics: one that may be asked for → how the format then runs, or why it cannot; empty where
    there is no choice.
    """

    format: str
    backend: str
    runs: str
    emulated: bool
    unfit: dict[str, str]
    arithmetics: dict[str, str]


@dataclass(frozen=True)
class Tuned:
    """What of `lowbit tune` is in use on the device; problem: why its file is not, or None.

    attention: for how many numbers of tokens.
    """

    path: str
    problem: str | None
    tiles: int
    backends: int
    attention: int


@dataclass(frozen=True)
class AutoAttention:
    """What `auto` of attention takes here for 16 bits and heads of 128 channels.

    hides: `unmasked` or `keys`, a mask of keys. tokens_min: from so many queries and keys on, up to
    the next. source: `tuned` by `lowbit tune`, `built in`, or torch's own.
    """

    hides: str
    tokens_min: int
    way: str
    source: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. Versions are None where the package is missing.

    cache: the folder of what `lowbit tune` found and, outside ComfyUI, of compiled kernels.
    """

    python: str
    platform: str
    torch: str
    cuda: str | None
    gpus: tuple[Gpu, ...]
    kitchen: str
    kitchen_backends: tuple[KitchenBackend, ...]
    packages: dict[str, str | None]
    host: Host | None
    device: str
    cache: str
    tuned: Tuned
    attention: tuple[AutoAttention, ...]
    formats: tuple[FormatSupport, ...]


def diagnose() -> Diagnosis:
    """Return what this machine has. Runs no kernel but the self-tests of backends."""
    gpus = tuple(_gpus())
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    return Diagnosis(
        python=platform.python_version(),
        platform=platform.platform(terse=True),
        torch=torch.__version__,
        cuda=torch.version.cuda or torch.version.hip,
        gpus=gpus,
        kitchen=importlib.metadata.version("comfy-kitchen"),
        kitchen_backends=tuple(_kitchen_backends()),
        packages={module: _version(module, names) for module, names in PACKAGES.items()},
        host=find_host(),
        device=str(device),
        cache=str(cache_folder.folder()),
        tuned=_tuned(device),
        attention=tuple(_auto_attention(device)),
        formats=tuple(_support(formats.get(name), device) for name in formats.names()),
    )


def _gpus() -> Iterator[Gpu]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        yield Gpu(found.name, (found.major, found.minor), found.total_memory)


def _tuned(device: torch.device) -> Tuned:
    gpu = tuning.gpu(device)
    *tiles, backends = (len(tuning.lookup(op, gpu)) for op in (PRODUCT, FOUR_BIT, OP))
    found = {} if gpu is None else tuning.choices(ATTENTION, gpu, auto.from_choice)
    tokens = {tokens for *_, tokens in found}
    return Tuned(str(tuning_file.path()), tuning.stored()[1], sum(tiles), backends, len(tokens))


def _auto_attention(device: torch.device) -> Iterator[AutoAttention]:
    """Yield what `auto` takes, the fewest tokens first."""
    for kind, hides in auto.SCHEMES.items():
        yield AutoAttention(hides, 0, SDPA, TORCHS_OWN)
        for start in reversed(auto.starts(device, auto.HEAD_SIZE, kind)):
            yield AutoAttention(hides, *start)


def _kitchen_backends() -> Iterator[KitchenBackend]:
    for name, state in comfy_kitchen.list_backends().items():
        if state["available"] and not state["disabled"]:
            yield KitchenBackend(name, None)
        else:
            yield KitchenBackend(name, state["unavailable_reason"] or "switched off")


def _version(module: str, names: tuple[str, ...]) -> str | None:
    """Return the version of a package without importing it, None where it is missing."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def find_host() -> Host | None:
    """Return the ComfyUI that this pack lies in, or COMFYUI_PATH, or ~/ComfyUI; None without."""
    around = Path(__file__).resolve().parents[2:4]
    places = [around[1]] if around[0].name == "custom_nodes" else []
    if os.environ.get("COMFYUI_PATH"):
        places.append(Path(os.environ["COMFYUI_PATH"]))
    for place in (*places, Path.home() / "ComfyUI"):
        try:
            text = (place / HOST_VERSION_FILE).read_text(encoding="utf-8")
        except OSError:
            continue
        found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
        return Host(str(place), found.group(1) if found else None)
    return None


def _support(fmt: formats.Format, device: torch.device) -> FormatSupport:
    # As the README's table, of many tokens.
    call = registry.Call(fmt.layout.scheme, device, N, K, few=False)
    unfit = {}
    for backend in registry.backends(OP):
        if call.scheme in backend.needs.schemes:
            reason = registry.unmet(backend.needs, call)
            if reason:
                unfit[backend.name] = reason
    chosen = registry.select(OP, call).name
    runs, emulated = arithmetic.of(chosen, call)
    return FormatSupport(fmt.name, chosen, runs, emulated, unfit, _arithmetics(call, unfit))


def _arithmetics(call: registry.Call, unfit: dict[str, str]) -> dict[str, str]:
    told = {}
    for wish in ARITHMETICS if call.scheme in GROUPS else ():
        if wish != AUTO:
            reason = unfit.get(backend_named(wish, call.scheme))
            runs = f"refused: {reason}" if reason else arithmetic.of_wish(wish, call).words
            told[wish] = runs
    return told
