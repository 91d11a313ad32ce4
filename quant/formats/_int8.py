"""What the INT8 formats share: a layout with one scale per output channel, rotated or not."""

from collections.abc import Mapping

import torch
from comfy_kitchen.tensor import TensorWiseINT8Layout

from .base import LowBitLayout


class INT8Layout(LowBitLayout, TensorWiseINT8Layout):
    """INT8 payload [N, K], float32 scale [N, 1]; files with a scalar scale are read too."""

    kitchen_layout = "TensorWiseINT8Layout"

    @classmethod
    def misfit(cls, shape: tuple[int, int], values: Mapping[str, torch.Tensor]) -> str | None:
        scale = values["scale"]
        if scale.numel() == 1 or tuple(scale.shape) == (shape[0], 1):
            return None
        return f"weight_scale has shape {tuple(scale.shape)}, [] or [{shape[0]}, 1] is wanted"
