"""Small diffusers models, made once: the demo's, whose weights are scaled as trained ones are."""

import copy
import dataclasses
import itertools

import pytest
import torch

from lowbit.quant import formats
from lowbit.quant.demo.models import BATCH, MODELS, TEXT_WIDTH, SmallModel, weights

pytest.importorskip("diffusers", reason="diffusers is not installed")
TEXT_TOKENS = 16
BLOCKS = 2
SMALL = [
    dataclasses.replace(small, config={**small.config, "num_layers": BLOCKS}) for small in MODELS
]
# Every format with one model or the other: what depends on both is tested elsewhere.
every_format = pytest.mark.parametrize(
    ("small", "name"),
    list(zip(itertools.cycle(SMALL), formats.names(), strict=False)),
    indirect=["small"],
    ids=lambda value: getattr(value, "name", value),
)
only_wan = pytest.mark.parametrize("small", SMALL[:1], indirect=True, ids=["wan"])
_built: dict[str, torch.nn.Module] = {}


@pytest.fixture(params=SMALL, ids=lambda small: small.name)
def small(request) -> SmallModel:
    return request.param


@pytest.fixture
def model(small) -> torch.nn.Module:
    """A model of the test's own, float32."""
    if small.name not in _built:
        _built[small.name] = small.build()
        _built[small.name].load_state_dict(weights(_built[small.name], seed=0))
    return copy.deepcopy(_built[small.name])


@pytest.fixture
def run(small):
    """Return a function that runs a model once, in the dtype given, always on the same values."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(small.latent_shape, generator=generator)
    text = torch.randn(BATCH, TEXT_TOKENS, TEXT_WIDTH, generator=generator)

    def once(model, dtype=torch.float32, sigma=0.5):
        with torch.inference_mode():
            return small.velocity(model, latent.to(dtype), sigma, text.to(dtype))

    return once
