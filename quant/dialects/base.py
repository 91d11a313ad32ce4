"""What a dialect is: how one program lays out quantized layers, and the way to the host's words."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy_kitchen.float_utils import from_blocked, swap_nibbles, to_blocked

from ..checkpoint.header import CheckpointError, TensorInfo
from ..formats import Format, flat_marker
from ..formats._blocks import COLUMNS, ROWS, round_up
from ..scale_order import FLAT, SWIZZLED, TWICE

Tensors = Mapping[str, torch.Tensor]
BYTES = {torch.uint8, torch.int8}
BLOCK_SCALES = {*BYTES, torch.float8_e4m3fn, torch.float8_e8m0fnu}
# Elements that share a scale: packed FP4 with E4M3 scales, FP8 with E8M0.
NVFP4_GROUP = 16
MX_GROUP = 32
# How markings of tiles end, and of rows.
BLOCKWISE = "_blockwise"
ROWWISE = "_rowwise"
# Of what scales in one line may be.
ROWS_OF_WEIGHT = "rows"
COLUMNS_OF_WEIGHT = "columns"
BOTH = f"{ROWS_OF_WEIGHT} or {COLUMNS_OF_WEIGHT}"


@dataclass(frozen=True)
class RawLayer:
    """A layer as a file holds it.

    parts: name within the layer, legacy names in the host's words → where it lies. marker: its
    `comfy_quant`, empty without one. order: of the block scales of the whole file, as `scale_order`
    names it; None: not known. lying: of what scales are in the layers like it, ROWS_OF_WEIGHT or
    COLUMNS_OF_WEIGHT; None: not known.
    """

    name: str
    parts: Mapping[str, TensorInfo]
    marker: Mapping[str, Any] = field(default_factory=dict)
    order: str | None = None
    lying: str | None = None

    def has(self, *parts: str) -> bool:
        return all(part in self.parts for part in parts)

    @property
    def is_packed(self) -> bool:
        """Whether two columns may share a byte."""
        # Of MXFP8 plain bytes are codes.
        return self.parts["weight"].dtype in BYTES and self.marker.get("format") != "mxfp8"

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K], two columns to a byte of an integer weight beside one-byte scales."""
        n, stored = self.parts["weight"].shape
        return n, stored * (2 if self.is_packed and self.has_block_scales else 1)

    @property
    def scales_are_of(self) -> str | None:
        """Of what its scales are by their shape if each is of a row or column, and not of tiles.

        BOTH where they are in one line and the weight is square; None where they are not so.
        """
        scale = self.parts.get("weight_scale")
        if scale is None or self.has_block_scales:
            return None
        if str(self.marker.get("format")).endswith(BLOCKWISE):
            return None
        n, k = self.parts["weight"].shape
        if n > 1 and scale.shape in ((n, 1), (n, 1, 1)):
            return ROWS_OF_WEIGHT
        found = {
            of
            for of, count in ((ROWS_OF_WEIGHT, n), (COLUMNS_OF_WEIGHT, k))
            if count > 1 and scale.shape in ((count,), (1, count), (1, count, 1))
        }
        return BOTH if len(found) > 1 else next(iter(found), None)

    @property
    def across(self) -> str | None:
        """As `scales_are_of` for scales [1, N] or [1, K] alone, None for others.

        Of a square weight what its marking says, or what the layers like it show.
        """
        own = self.scales_are_of
        if own is None or self.parts["weight_scale"].shape[0] != 1:
            return None
        if own != BOTH:
            return own
        rowwise = str(self.marker.get("format")).endswith(ROWWISE)
        # A rotated weight has one scale per row whatever else its marking says.
        rowwise = rowwise or bool(flat_marker(self.marker).get("convrot"))
        return ROWS_OF_WEIGHT if rowwise else self.lying or BOTH

    @property
    def has_block_scales(self) -> bool:
        scale = self.parts.get("weight_scale")
        return scale is not None and scale.dtype in BLOCK_SCALES

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Rows and columns of the block scales, without padding."""
        n, k = self.shape
        e4m3 = self.parts["weight_scale"].dtype == torch.float8_e4m3fn
        nvfp4 = self.is_packed and (e4m3 or self.has("weight_scale_2"))
        return n, -(-k // (NVFP4_GROUP if nvfp4 else MX_GROUP))

    def orders(self) -> set[str]:
        """Return the orders that the number of block scales, and what is known, leave open."""
        if not self.has_block_scales:
            return set()
        rows, columns = self.scale_shape
        count = math.prod(self.parts["weight_scale"].shape)
        sizes = {
            FLAT: rows * columns,
            SWIZZLED: round_up(rows, ROWS) * round_up(columns, COLUMNS),
        }
        sizes[TWICE] = sizes[SWIZZLED]
        fitting = {order for order, size in sizes.items() if size == count}
        # Twice is a mistake that has to be proven; nobody writes it on purpose.
        return fitting & {self.order} if self.order else fitting - {TWICE}


@dataclass(frozen=True)
class Reading:
    """How a layer is read that is not in the host's words.

    dialect: whose words they are, as `--from` takes it. certain: whether nobody else writes such
    tensors. format: of ours that holds the same numbers; None: none does. shape: [N, K]. convert:
    tensors by part → the host's parts, bit for bit; without a format {"weight": float32 [N, K]}.
    """

    dialect: str
    format: Format | None
    shape: tuple[int, int]
    convert: Callable[[Tensors], dict[str, torch.Tensor]]
    certain: bool = True


def block_parts(
    fmt: Format, weight: torch.Tensor, scale: torch.Tensor, order: str, *, low_first: bool = False
) -> dict[str, torch.Tensor]:
    """Return `weight` and `weight_scale` of a block-scaled format as the host lays them out.

    weight: [N, K / packed] as stored. scale: one-byte scales in `order`. low_first: the even column
    is in the low nibble. Rows are padded with zeros to what the format wants.
    """
    rows, stored = weight.shape
    columns = stored * fmt.packed // fmt.group
    padded = round_up(rows, ROWS), round_up(columns, COLUMNS)
    codes = scale.contiguous().view(torch.uint8)
    if order == FLAT:
        codes = to_blocked(codes.reshape(rows, columns), flatten=False)
    elif order == TWICE:
        codes = from_blocked(codes.reshape(padded), *padded).contiguous()
    if low_first:
        weight = swap_nibbles(weight.view(torch.uint8))
    height = round_up(rows, fmt.pad_multiple)
    if height != rows:
        codes_of_weight = weight.view(torch.uint8)
        weight = torch.nn.functional.pad(codes_of_weight, (0, 0, 0, height - rows))
    weight = weight.view(fmt.storage)
    scale = codes.reshape(padded).view(fmt.scale_dtypes["weight_scale"])
    return {"weight": weight, "weight_scale": scale}


def check_single(layer: RawLayer, dialect: str, *parts: str) -> None:
    """Raise CheckpointError where one of `parts` is there with more than one element, or none."""
    for part in filter(layer.has, parts):
        info = layer.parts[part]
        if math.prod(info.shape) != 1:
            raise CheckpointError(
                f"{info.path}: layer {layer.name}: {part} has shape {list(info.shape)}, {dialect} "
                "writes one value for a tensor; write the file again, or quantize the 16-bit one "
                "with `lowbit quantize`"
            )


def optional(tensors: Tensors, *parts: str) -> dict[str, torch.Tensor]:
    """Return those of `parts` that are there."""
    return {part: tensors[part] for part in parts if part in tensors}
