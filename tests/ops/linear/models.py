"""A small model with FP8 weights, as wrappers hold them, for the tests of conversions."""

import torch
from torch import nn

from lowbit.ops.linear import convert_fp4_linear, convert_fp8_linear
from lowbit.quant import formats

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative error of a product with an NVFP4 weight: that of the weight.
NVFP4_ERROR = formats.get("nvfp4").max_error
WIDTH = 64
SCALE = 0.02


def make(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 80), nn.GELU(), nn.Linear(80, WIDTH, bias=False))
        self.modulation = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.ffn(self.norm(x)) + self.modulation(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 5)
        self.requires_grad_(False)
        for index, parameter in enumerate(self.parameters()):
            parameter.copy_(make(*parameter.shape, seed=index))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


KEPT = ("modulation", "head")
LAYERS = ("blocks.0.ffn.0", "blocks.0.ffn.2", "blocks.1.ffn.0", "blocks.1.ffn.2")
SCALES = {f"{name}.scale_weight": torch.tensor(SCALE) for name in LAYERS}
KINDS = {"fp8": convert_fp8_linear, "fp4": convert_fp4_linear}


def fp8_model(dtype: torch.dtype = E4M3) -> Model:
    """A model whose feed-forward weights are FP8, to be multiplied by SCALE."""
    model = Model()
    for name in LAYERS:
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter((linear.weight / SCALE).to(dtype), requires_grad=False)
    return model


def values_of(model: Model) -> Model:
    """The same model in float64, its FP8 weights multiplied by SCALE."""
    twin = Model().double()
    state = model.state_dict()
    for name in LAYERS:
        state[f"{name}.weight"] = state[f"{name}.weight"].double() * SCALE
    twin.load_state_dict(state)
    return twin


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def converted(kind: str, **kwargs):
    """A converted model, and what its conversion gave."""
    model = fp8_model()
    return model, KINDS[kind](model, torch.float32, KEPT, SCALES, **kwargs)
