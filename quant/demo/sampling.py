"""Loading a quantized file into a diffusers model, and sampling with it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from .. import families
from ..checkpoint import Checkpoint, CheckpointError
from ..checkpoint.stored import MARKER, stored_layers

# The activations of the demo. Float32, so that what differs from the source is the format's doing.
COMPUTE_DTYPE = torch.float32


@dataclass(frozen=True)
class Sampled:
    """The final latent, and the median time of a step."""

    latent: torch.Tensor
    seconds_per_step: float


def load(model: torch.nn.Module, path: str) -> int:
    """Put every tensor of the file `path` into the diffusers `model`; return layers quantized.

    The file bears the host's names or diffusers'. Weights of quantized layers stay as stored:
    their `nn.Linear` then runs `ops.linear`.
    Raises CheckpointError that names what the file or the model lacks.
    """
    checkpoint = Checkpoint(path)
    to_model = _names_in(model)
    layers = stored_layers(checkpoint)
    of_layers = {tensor for layer in layers.values() for tensor in layer.parts.values()}
    dense = {
        to_model.get(name, name): name
        for name in checkpoint
        if name not in of_layers and name.rpartition(".")[2] != MARKER
    }
    quantized = {
        to_model.get(f"{name}.weight", f"{name}.weight"): layer for name, layer in layers.items()
    }
    wanted, found = model.state_dict().keys(), dense.keys() | quantized.keys()
    if wanted != found:
        raise CheckpointError(
            f"{path}: the file lacks {sorted(wanted - found)}, the model {sorted(found - wanted)}"
        )
    for name, layer in quantized.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        weight = layer.load(checkpoint, dtype=COMPUTE_DTYPE)
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    tensors = {name: checkpoint.read(stored) for name, stored in dense.items()}
    model.load_state_dict(tensors, strict=False)
    return len(layers)


def _names_in(model: torch.nn.Module) -> dict[str, str]:
    """Return host's name -> name in `model`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {host: name for name, host in families.recognise(shapes).renamed.items()}


def sample(
    velocity: Callable[[torch.Tensor, float], torch.Tensor], noise: torch.Tensor, steps: int
) -> Sampled:
    """Return the latent that `steps` Euler steps of flow matching lead to from `noise`.

    velocity: (latent, sigma) -> d latent / d sigma; sigma falls from 1, noise, to 0.
    """
    latent, seconds = noise, []
    with torch.inference_mode():
        for sigma, following in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
            start = time.perf_counter()
            latent = latent + (following - sigma) * velocity(latent, sigma)
            seconds.append(time.perf_counter() - start)
    return Sampled(latent, statistics.median(seconds))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return ‖got - want‖ / ‖want‖."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
