"""The demo: two small models, quantized to every format, sampled and compared, on any CPU."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from statistics import fmean

import torch
from safetensors.torch import save_file

from ...ops import registry
from ...ops.linear import OP
from .. import formats
from ..quantize_file import quantize_file
from ..report import bits_per_weight
from . import page, plot, sampling
from .models import BATCH, MODELS, TEXT_WIDTH, WIDTH, SmallModel, weights
from .row import Row

__all__ = ["PACKAGES", "PAGE", "PLOT", "SOURCE", "Row", "run"]

SOURCE = "bf16"
SOURCE_BITS = 8 * torch.bfloat16.itemsize
PAGE = "demo.html"
PLOT = "demo.png"
# What pip is to install, by package: the extra `demo` of pyproject.toml. Older diffusers want
# another argument of Qwen-Image.
PACKAGES = {"diffusers": "diffusers>=0.37", "matplotlib": "matplotlib>=3.8"}
STEPS = 4
SEED = 0
TEXT_TOKENS = 16

Progress = Callable[[int, int], None]


def run(out: str | os.PathLike, progress: Progress = lambda done, total: None) -> list[Row]:
    """Make, quantize and sample the small models; return a row for each model and format.

    out: folder, made if missing, for the checkpoints `demo-MODEL-FORMAT.safetensors`, PAGE and
    PLOT; files of these names are replaced. progress: called with (rows done, all rows).
    Raises ValueError when a package of PACKAGES is missing.
    """
    _check_packages()
    out = os.fspath(out)
    os.makedirs(out, exist_ok=True)
    total = len(MODELS) * (1 + len(formats.names()))
    rows: list[Row] = []
    with _one_thread():
        for small in MODELS:
            for row in _rows(small, out):
                rows.append(row)
                progress(len(rows), total)
    plot.draw(rows, os.path.join(out, PLOT))
    page.write(rows, os.path.join(out, PLOT), os.path.join(out, PAGE))
    return rows


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(f'"{PACKAGES[name]}"' for name in missing)
        raise ValueError(f"the demo needs {' and '.join(missing)}: pip install {wanted}")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: these products are so small that handing them around costs more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rows(small: SmallModel, out: str) -> Iterator[Row]:
    """Yield the row of the source, then of each format, as each is done."""
    paths = {
        name: os.path.join(out, f"demo-{small.name}-{name}.safetensors")
        for name in (SOURCE, *formats.names())
    }
    save_file(weights(small.build(), SEED), paths[SOURCE])
    reference = _sample(small, paths[SOURCE])[1]
    yield Row(
        model=small.title,
        format=SOURCE,
        path=paths[SOURCE],
        layers=0,
        size_bytes=os.path.getsize(paths[SOURCE]),
        bits=SOURCE_BITS,
        seconds_per_step=reference.seconds_per_step,
    )
    for name in formats.names():
        yield _measure(small, name, paths[SOURCE], paths[name], reference.latent)


def _measure(small: SmallModel, name: str, source: str, target: str, want: torch.Tensor) -> Row:
    result = quantize_file(source, target, name, overwrite=True)
    layers, sampled = _sample(small, target)
    quantized = [record for record in result.records if record.format]
    return Row(
        model=small.title,
        format=name,
        path=target,
        layers=layers,
        size_bytes=os.path.getsize(target),
        bits=bits_per_weight(quantized),
        seconds_per_step=sampled.seconds_per_step,
        weight_error=fmean(record.error for record in quantized),
        output_error=sampling.relative_error(sampled.latent, want),
        quantize_seconds=result.seconds,
        backend=_backend(formats.get(name)),
    )


def _backend(fmt: formats.Format) -> str:
    """Return the name of the backend that runs layers of `fmt` here."""
    call = registry.Call(fmt.layout.scheme, torch.device("cpu"), WIDTH, WIDTH)
    return registry.select(OP, call).name


def _sample(small: SmallModel, path: str) -> tuple[int, sampling.Sampled]:
    """Return how many layers of `path` are quantized, and what the model makes of them.

    Noise and prompts are the same for every file.
    """
    model = small.build()
    layers = sampling.load(model, path)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(small.latent_shape, generator=generator)
    text = torch.randn(BATCH, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    sampled = sampling.sample(
        lambda latent, sigma: small.velocity(model, latent, sigma, text), noise, STEPS
    )
    return layers, sampled
