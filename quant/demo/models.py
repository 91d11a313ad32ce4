"""The two small models of the demo: diffusers' own classes with made-up weights.

Each tensor is random, but scaled as trained models have it: activations stay near 1, two input
channels of every linear layer are larger than the rest, and the modulation of every block enlarges
two channels of what goes into attention and the MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WIDTH = 256
HEAD_SIZE = 128
TEXT_WIDTH = 256
OUTLIER_WEIGHT = 4.0
OUTLIER_SCALE = 4.0
# Rows of a block's six modulation vectors: shift, scale, gate for attention, then for the MLP.
SCALE_ROWS = (1, 4)
GATE_ROWS = (2, 5)
GATE = 0.5
# Wan takes the time as 0..1000, Qwen-Image in diffusers as 0..1.
WAN_TIMESTEPS = 1000
QWEN_GRID = (1, 8, 8)
# Samples at a time: the error of a single one depends on its noise by a factor of two.
BATCH = 4

Velocity = Callable[[torch.nn.Module, torch.Tensor, float, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SmallModel:
    """A model of the demo.

    name: begins its files. class_name: in diffusers. velocity: (model, latent, sigma in 0..1,
    text [BATCH, L, TEXT_WIDTH]) -> the model's output, shaped as the latent.
    """

    name: str
    title: str
    class_name: str
    config: dict[str, Any]
    latent_shape: tuple[int, ...]
    velocity: Velocity

    def build(self) -> torch.nn.Module:
        """Return the model in float32, on the CPU, with the weights that diffusers begins with."""
        import diffusers

        return getattr(diffusers, self.class_name)(**self.config).eval().requires_grad_(False)


def _wan_velocity(model, latent, sigma, text):
    time = torch.full((BATCH,), sigma * WAN_TIMESTEPS, device=latent.device)
    return model(latent, timestep=time, encoder_hidden_states=text, return_dict=False)[0]


def _qwen_velocity(model, latent, sigma, text):
    return model(
        latent,
        timestep=torch.full((BATCH,), sigma, device=latent.device),
        encoder_hidden_states=text,
        img_shapes=[[QWEN_GRID]] * BATCH,
        return_dict=False,
    )[0]


MODELS = (
    SmallModel(
        name="wan",
        title="Wan",
        class_name="WanTransformer3DModel",
        config={
            "num_attention_heads": WIDTH // HEAD_SIZE,
            "attention_head_dim": HEAD_SIZE,
            "ffn_dim": 4 * WIDTH,
            "num_layers": 4,
            "text_dim": TEXT_WIDTH,
        },
        latent_shape=(BATCH, 16, 1, 16, 16),
        velocity=_wan_velocity,
    ),
    SmallModel(
        name="qwen_image",
        title="Qwen-Image",
        class_name="QwenImageTransformer2DModel",
        config={
            "num_attention_heads": WIDTH // HEAD_SIZE,
            "attention_head_dim": HEAD_SIZE,
            "num_layers": 2,
            "joint_attention_dim": TEXT_WIDTH,
        },
        latent_shape=(BATCH, QWEN_GRID[1] * QWEN_GRID[2], 64),
        velocity=_qwen_velocity,
    ),
)


def weights(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Return bfloat16 tensors by name for every parameter of `model`, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _values(name, torch.randn(tuple(parameter.shape), generator=generator)).bfloat16()
        for name, parameter in model.named_parameters()
    }


def _values(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Return the values of the tensor `name`, made of noise ~ N(0, 1)."""
    if name.endswith("scale_shift_table"):
        return _modulation(0.1 * noise)
    if name.endswith("_mod.1.bias"):
        return _modulation(0.1 * noise.view(1, 6, -1)).view(-1)
    if noise.ndim == 1:
        is_gain = "norm" in name and name.endswith("weight")
        return 0.05 * noise + float(is_gain)
    values = noise * noise[0].numel() ** -0.5
    if noise.ndim == 2:
        values[:, _outliers(noise.shape[1])] *= OUTLIER_WEIGHT
    # What depends on the time stays small beside the constant part of the modulation.
    small = "time_proj" in name or "_mod." in name or "norm_out.linear" in name
    return 0.2 * values if small else values


def _modulation(rows: torch.Tensor) -> torch.Tensor:
    """Return the modulation [1, 6, D] of a block with outliers and open gates; others as is."""
    if rows.shape[1] == 6:
        for row in SCALE_ROWS:
            rows[0, row, _outliers(rows.shape[2])] = OUTLIER_SCALE
        for row in GATE_ROWS:
            rows[0, row] += GATE
    return rows


def _outliers(width: int) -> list[int]:
    return [3, width // 2]
