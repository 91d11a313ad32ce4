"""The contest of tiles for one product, and that of backends for one linear layer.

Operands lie on a device, a GPU or, in tests, the CPU; they have rows for the largest M that is
tried, of which the first ones are taken.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...ops import registry
from ...ops.failures import failures
from ...ops.linear import OP as LINEAR
from ...ops.linear import linear
from ...ops.linear.four_bit import FEW_ROWS, GROUPS
from ...ops.scaled_mm import scaled_mm, tiles
from ...ops.scaled_mm.candidates import neighbours
from ...ops.scaled_mm.check import is_few
from ...ops.scaled_mm.tiles import Tile
from ...ops.scaled_mm.triton import run_tile
from ...ops.tuning import Gpu
from ..formats import Format
from .contest import CannotRunError

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
OUT = torch.bfloat16
# Rows of the expected product that are made at a time, and rows of a layer that are checked.
REFERENCE_ROWS = 2048
CHECKED_ROWS = 256
WEIGHT_SCALE = 0.02
# Standard deviations that the largest value of a row is from zero, about.
LARGEST = 4
SEED = 0


class Product:
    """Tiles for [M, K] times [N, K] in INT8 or FP8; names are `Tile`."""

    def __init__(self, scheme: str, rows: int, n: int, k: int, gpu: Gpu, device: torch.device):
        self._gpu, self._shape, self._integer = gpu, (n, k), scheme == "int8"
        self._out = torch.empty(rows, n, dtype=OUT, device=device)
        generator = torch.Generator(device).manual_seed(SEED)
        self._exact = _exact_operands(rows, n, k, TYPES[scheme], generator)
        self._typical = _typical_operands(rows, n, k, TYPES[scheme], generator)

    def right(self, tile: Tile, rows: int) -> bool:
        """Return whether the product is that of the reference, bit for bit."""
        return self._is_expected(tile, self._out[:rows], self._product)

    def serves(self, tile: Tile) -> bool:
        """Return whether the other products that take the tile are right too, in some rows.

        Those with zero points, and those with a float32 result where `choose` has it for them.
        """
        rows = min(self._out.shape[0], REFERENCE_ROWS)
        if tiles.fits(tile, wide=True):
            out = self._out.new_empty((rows, self._out.shape[1]), dtype=torch.float32)
            if not self._is_expected(tile, out, self._reference(0, out_dtype=out.dtype)):
                return False
        if not self._integer:
            return True
        return self._is_expected(tile, self._out[:rows], self._reference(0, shifted=True), True)

    def _is_expected(
        self, tile: Tile, out: torch.Tensor, wanted: torch.Tensor, shifted: bool = False
    ) -> bool:
        out.fill_(torch.nan)
        attempt(lambda: self._launch(tile, out, self._exact, shifted), out.device)
        return torch.equal(out, wanted[: out.shape[0]])

    def run(self, tile: Tile, rows: int) -> None:
        """Write the product of numbers as weights and activations are, which cost more power."""
        self._launch(tile, self._out[:rows], self._typical)

    def default(self, rows: int) -> Tile:
        """Return the table's tile, without the rate, which is no matter of how it runs."""
        capability, processors = self._gpu.capability, self._gpu.processors
        tile = tiles.choose(capability, processors, rows, *self._shape, self._integer)
        return dataclasses.replace(tile, rate=1.0)

    def neighbours(self, tile: Tile) -> Sequence[Tile]:
        """Return the tile with its loops in other orders."""
        return neighbours(tile, self._out.shape[0])

    def _launch(self, tile: Tile, out: torch.Tensor, operands: dict, shifted: bool = False) -> None:
        rows = out.shape[0]
        run_tile(
            out=out,
            a=operands["a"][:rows],
            b=operands["b"],
            scale_a=operands["scale_a"][:rows],
            scale_b=operands["scale_b"],
            bias=operands["bias"],
            zero_point=operands["zero_point"][:rows] if shifted else None,
            column_sum=operands["column_sum"] if shifted else None,
            tile=tile,
            processors=self._gpu.processors,
        )

    @functools.cached_property
    def _product(self) -> torch.Tensor:
        """The reference's product, [M, N]."""
        starts = range(0, self._out.shape[0], REFERENCE_ROWS)
        return torch.cat([self._reference(start) for start in starts])

    def _reference(
        self, start: int, shifted: bool = False, out_dtype: torch.dtype = OUT
    ) -> torch.Tensor:
        """Return some rows of the reference's product."""
        x, rows = self._exact, slice(start, start + REFERENCE_ROWS)
        return scaled_mm(
            x["a"][rows],
            x["b"],
            x["scale_a"][rows],
            x["scale_b"],
            x["bias"],
            zero_point=x["zero_point"][rows] if shifted else None,
            column_sum=x["column_sum"] if shifted else None,
            out_dtype=out_dtype,
            backend="reference",
        )


def _exact_operands(rows: int, n: int, k: int, dtype: torch.dtype, generator) -> dict:
    """Return operands whose product no order of sums and no fused rounding changes.

    -1, 0 and 1: sums stay below the 2^13 that Hopper's FP8 accumulator holds exactly; scales are
    powers of two, the bias and the zero points whole numbers.
    """
    device = generator.device

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        options = {"generator": generator, "device": device, "dtype": torch.int8}
        return torch.randint(low, high + 1, shape, **options)

    def narrow(*shape: int) -> torch.Tensor:
        return whole(-1, 1, *shape).to(dtype)

    a, b = narrow(rows, k), narrow(n, k)
    return {
        "a": a,
        "b": b,
        "scale_a": torch.exp2(whole(-2, 0, rows, 1).float()),
        "scale_b": torch.exp2(whole(-2, 0, n, 1).float()),
        "bias": whole(-4, 4, n).to(OUT),
        "zero_point": whole(-3, 3, rows).int(),
        "column_sum": b.to(OUT).sum(1, dtype=torch.float32).int(),
    }


def _typical_operands(rows: int, n: int, k: int, dtype: torch.dtype, generator) -> dict:
    """Return operands as quantizing normal numbers gives them."""
    device = generator.device
    limit = (torch.iinfo if dtype == torch.int8 else torch.finfo)(dtype).max

    def narrow(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, device=device, dtype=OUT)
        return x.mul_(limit / LARGEST).clamp_(-limit, limit).to(dtype)

    scale = torch.full((max(rows, n), 1), 1 / limit, device=device)
    bias = torch.zeros(n, dtype=OUT, device=device)
    a, b = narrow(rows, k), narrow(n, k)
    return {"a": a, "b": b, "scale_a": scale[:rows], "scale_b": scale[:n], "bias": bias}


def attempt(
    run: Callable[[], Any], device: torch.device, refusals: tuple[type[Exception], ...] = ()
) -> Any:
    """Return what `run` returns, once the device is done. Raises CannotRunError that says why not.

    refusals: what else `run` raises where it cannot.
    What fails on the device, rather than while it is compiled or launched, is raised as it is:
    nothing runs on that device afterwards.
    """
    try:
        result = run()
    except torch.OutOfMemoryError:
        raise
    except (*failures(), *refusals) as error:
        _wait(device)
        text = str(error).strip() or type(error).__name__
        raise CannotRunError(text.splitlines()[0]) from error
    _wait(device)
    return result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Layer:
    """Backends for a linear layer [N, K] of one format; names are those of backends."""

    def __init__(self, fmt: Format, rows: int, n: int, k: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(SEED)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=OUT)

        self._x = normal(rows, k)
        self._plain = normal(n, k) * WEIGHT_SCALE
        self._weight, self._bias = fmt.quantize(self._plain), normal(n)
        self._call = registry.Call(fmt.layout.scheme, self._x.device, n, k)
        self._four_bits = fmt.layout.scheme in GROUPS
        # The activation is rounded about as the weight was.
        self._bound = 2 * fmt.max_error + torch.finfo(OUT).eps

    def names(self) -> tuple[str, ...]:
        """Return the backends that can run the layer here, without those that want to be named."""
        found = (b for b in registry.backends(LINEAR) if b.needs.measured != registry.BY_NAME)
        able = [b.name for b in found if registry.unmet(b.needs, self._call) is None]
        return tuple(dict.fromkeys(able))

    def right(self, name: str, rows: int) -> bool:
        """Return whether the result is near that of the weight's values, in some of the rows."""
        x = self._x[:rows]
        some = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=x.device).long()
        weight = self._weight.dequantize().double()
        want = F.linear(x[some].double(), weight, self._bias.double())
        got = attempt(lambda: self.run(name, rows), x.device)[some].double()
        # Not `>`, which NaN would pass.
        return bool((got - want).norm() <= self._bound * want.norm())

    def serves(self, name: str) -> bool:
        """Return True: `right` asks all that there is to ask."""
        return True

    def run(self, name: str, rows: int) -> torch.Tensor:
        """Return the layer's result, the quantization of the activation included."""
        return linear(self._x[:rows], self._weight, self._bias, name)

    def plain(self, rows: int) -> torch.Tensor:
        """Return the result of the weight that was never quantized, in bfloat16."""
        return F.linear(self._x[:rows], self._plain, self._bias)

    def default(self, rows: int) -> str:
        """Return what `auto` takes where nothing is tuned."""
        few = rows <= FEW_ROWS if self._four_bits else is_few(rows, 0)
        return registry.select(LINEAR, self._call._replace(few=few)).name

    def neighbours(self, name: str) -> Sequence[str]:
        """Return nothing: there are few backends, and all are candidates."""
        return ()
