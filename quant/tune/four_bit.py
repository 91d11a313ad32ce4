"""The contest of tiles for a product of 16-bit activations and a 4-bit weight."""

import functools
from collections.abc import Sequence

import torch

from ...ops.block_scales import pack_e2m1
from ...ops.decode_fp4 import E2M1, MXFP4_GROUP, NVFP4_GROUP, SCALE_COLUMNS, SCALE_ROWS
from ...ops.fp4_mm import fp4_mm
from ...ops.fp4_mm.choice import AnyTile, default_tile
from ...ops.fp4_mm.triton import run_by
from ...ops.linear.four_bit import GROUPS
from ...ops.tuning import Gpu
from .products import OUT, REFERENCE_ROWS, SEED, attempt

# By the scheme of `fp4_mm`, the elements that share a scale.
GROUP_OF = {f"{name}_16": group for name, group in GROUPS.items()}
# Bytes of block scales that are 0.5, 1 and 2: E4M3, and E8M0.
SCALES = {NVFP4_GROUP: (0x30, 0x38, 0x40), MXFP4_GROUP: (126, 127, 128)}


class FourBitProduct:
    """Tiles for [M, K] in bfloat16 times a 4-bit weight [N, K]; names are those of `choice.py`."""

    def __init__(self, scheme: str, rows: int, n: int, k: int, gpu: Gpu, device: torch.device):
        self._gpu, self._group, self._n = gpu, GROUP_OF[scheme], n
        generator = torch.Generator(device).manual_seed(SEED)
        options = {"generator": generator, "device": device}
        columns = -(-k // self._group) * self._group

        def whole(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high + 1, shape, **options)

        # Products are multiples of a quarter, sums far below 2^24 of them: float32 holds any part
        # of them exactly, in whichever order they are added.
        self._exact = whole(-1, 1, rows, k).to(OUT)
        self._typical = torch.randn(rows, k, **options, dtype=OUT)
        codes = torch.tensor(E2M1, device=device)[whole(0, 15, n, columns)]
        self._packed = pack_e2m1(codes)
        wide = -(-(columns // self._group) // SCALE_COLUMNS) * SCALE_COLUMNS
        height = -(-n // SCALE_ROWS) * SCALE_ROWS
        known = torch.tensor(SCALES[self._group], dtype=torch.uint8, device=device)
        self._scale = known[whole(0, 2, height * wide)]
        self._tensor_scale = torch.full((1,), 0.5, device=device)
        self._bias = whole(-4, 4, n).to(OUT)

    def right(self, tile: AnyTile, rows: int) -> bool:
        """Return whether the product is that of the reference, bit for bit."""
        got = attempt(lambda: self._run(tile, self._exact[:rows]), self._exact.device)
        return torch.equal(got, self._product[:rows])

    def serves(self, tile: AnyTile) -> bool:
        """Return whether the product without a bias is right too, in some rows."""
        x = self._exact[:REFERENCE_ROWS]
        got = attempt(lambda: self._run(tile, x, False), x.device)
        return torch.equal(got, self._reference(0, False))

    def run(self, tile: AnyTile, rows: int) -> torch.Tensor:
        """Return the product of activations as layers have them, which cost more power."""
        return self._run(tile, self._typical[:rows])

    def default(self, rows: int) -> AnyTile:
        """Return what is taken where nothing is tuned."""
        return default_tile(rows, self._group, self._gpu.capability)

    def neighbours(self, tile: AnyTile) -> Sequence[AnyTile]:
        """Return nothing: all that there is to try are candidates."""
        return ()

    def _run(self, tile: AnyTile, x: torch.Tensor, biased: bool = True) -> torch.Tensor:
        weight = (self._packed, self._scale, self._tensor_scale)
        bias = self._bias if biased else None
        return run_by(tile, x, *weight, bias, self._n, self._group)

    @functools.cached_property
    def _product(self) -> torch.Tensor:
        """The reference's product, [M, N]."""
        starts = range(0, self._exact.shape[0], REFERENCE_ROWS)
        return torch.cat([self._reference(start) for start in starts])

    def _reference(self, start: int, biased: bool = True) -> torch.Tensor:
        """Return some rows of the reference's product."""
        x = self._exact[start : start + REFERENCE_ROWS]
        bias = self._bias if biased else None
        weight = (self._packed, self._scale, self._tensor_scale, (self._n, x.shape[1]))
        return fp4_mm(x, *weight, self._group, bias, "reference")
