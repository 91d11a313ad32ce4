"""Formats that ComfyUI does not know, on their way through its loader.

It refuses unknown names, so a layer of ours passes under the name of a format of its own that has
the same tensors; a packed payload is shown as that format's dtype, not a byte of it changed. Once
the model is built, each weight gets its own layout (`host/linear.py`) before anybody computes with
it.
"""

import json

import torch

from ..quant import families, formats
from ..quant.checkpoint.stored import MARKER, marker_tensor
from ..quant.formats.base import flat_marker

FULL_PRECISION = "full_precision_matrix_mult"


def disguise(state: dict[str, torch.Tensor]) -> dict[str, formats.Format]:
    """Put markers that the host knows in place of ours; return the true formats by layer.

    state: the tensors of a model by the host's names, changed in place. Raises ValueError that
    names the layer where a format of ours cannot do what its marker asks.
    """
    found = {}
    prefix = families.recognise({n: tuple(t.shape) for n, t in state.items()}).prefix
    for key in [n for n in state if n.endswith(f".{MARKER}")]:
        marker = json.loads(state[key].numpy().tobytes())
        fmt = formats.from_marker(marker)
        if not fmt.stand_in:
            continue
        name = key.removesuffix(f".{MARKER}")
        storage = formats.from_marker({"format": fmt.stand_in}).storage
        if storage != fmt.storage and flat_marker(marker).get(FULL_PRECISION):
            raise ValueError(
                f"layer {name}: {FULL_PRECISION} is not supported in {fmt.name}; quantize the file "
                "again, without the layer"
            )
        found[name.removeprefix(prefix)] = fmt
        state[key] = marker_tensor({**marker, "format": fmt.stand_in})
        state[f"{name}.weight"] = state[f"{name}.weight"].view(storage)
    return found
