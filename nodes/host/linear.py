"""Our weights in the host's Linear: a module that shows one under our layout.

A QuantizedTensor stays the module's `weight`, which the host moves, patches and saves as its own.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from comfy_kitchen.tensor import QuantizedTensor

from ...ops.linear.activation import Kind, kind_of
from ...ops.linear.arithmetic import AUTO, arithmetic_of, with_arithmetic
from ...ops.linear.four_bit import GROUPS
from ...quant import arithmetic, formats
from ...quant.checkpoint.stored import INPUT_SCALES
from . import clones

logger = logging.getLogger(__name__)


def format_of(module) -> formats.Format | None:
    """Return the format of a module's weight, under our layout or the host's, or None."""
    if not isinstance(module.weight, QuantizedTensor):
        return None
    return formats.from_marker(_marker(module))


def _marker(module) -> dict:
    """Return the `comfy_quant` marker of one of the host's quantized modules."""
    params = module.weight._params
    return {"format": module.quant_format, "convrot": getattr(params, "convrot", False)}


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Have a ValueError about a weight say of which layer it is."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"layer {layer}: {problem}") from problem


def show(
    module, fmt: formats.Format, weight: QuantizedTensor, wish: str = AUTO, device=None
) -> None:
    """Give a module, which nobody else holds, `weight` under our layout.

    wish: in which arithmetic 4 bits are multiplied; AUTO: the one that `weight` asks for already.
    device: where the module will run.
    """
    import comfy.quant_ops

    payload = weight._qdata.view(fmt.storage)
    quantized = QuantizedTensor(payload, fmt.layout.__name__, weight._params)
    if fmt.layout.scheme in GROUPS:
        wish = arithmetic_of(weight) if wish == AUTO else wish
        quantized = with_arithmetic(quantized, wish, device)
    module.weight = torch.nn.Parameter(quantized, requires_grad=False)
    module.quant_format = fmt.marker["format"]
    module.layout_type = quantized._layout_cls
    # Where the host would quantize the activation itself, take it as it is: our layouts do that.
    host_format = comfy.quant_ops.QUANT_ALGOS.get(fmt.stand_in or module.quant_format, {})
    module._full_precision_mm = host_format.get("quantize_input", True) and not is_static(module)


def is_static(module) -> bool:
    """Return whether the host quantizes a module's input for us: to FP8, with the file's scale."""
    scale = getattr(module, "input_scale", None)
    return scale is not None and kind_of(module.weight) == Kind(torch.float8_e4m3fn, 0)


def replacement(
    module, fmt, weight, scales_too: bool, wish: str = AUTO, device=None
) -> torch.nn.Module:
    """Return a Linear of the host's with `weight` and the bias of `module`.

    scales_too: with the scales of its input as well, which belong to the stored bits. wish, device:
    as `show` has them.
    """
    new = clones.operations(weight.dtype).Linear(
        module.in_features, module.out_features, bias=False, device="meta", dtype=weight.dtype
    )
    if module.bias is not None:
        # Another Parameter on the same memory: the host moves Parameters from device to device.
        new.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
    for extra in INPUT_SCALES if scales_too else ():
        value = getattr(module, extra, None)
        if value is not None:
            new.register_parameter(extra, torch.nn.Parameter(value.detach(), requires_grad=False))
    show(new, fmt, weight, wish, device)
    return new.eval()


def log_arithmetic(patcher, layers: dict[str, torch.nn.Module], wish: str) -> None:
    """Say, once for a model, by which arithmetic `layers`, our own, run on its device.

    Raises ValueError where a wish is none of theirs, NoBackendError where it cannot run.
    """
    weights = [module.weight for module in layers.values()]
    if wish != AUTO and not any(weight.layout_cls.scheme in GROUPS for weight in weights):
        raise ValueError(f"arithmetic {wish}: the model has no layers of {', '.join(GROUPS)}")
    logger.info("LowBit layers: %s", arithmetic.summary(weights, patcher.load_device))
