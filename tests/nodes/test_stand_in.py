"""Layers of formats that the host does not know, under names that it does."""

import json

import pytest
import torch

from lowbit.nodes import stand_in
from lowbit.quant import formats
from lowbit.quant.checkpoint.stored import marker_tensor

OURS = [name for name in formats.names() if not formats.get(name).native]
LAYER = "blocks.0.ffn.0"


def state(name: str, **marker) -> dict[str, torch.Tensor]:
    fmt = formats.get(name)
    weight = torch.linspace(-1, 1, 64 * 256).reshape(64, 256)
    parts = fmt.pack(fmt.quantize(weight)) | {
        "comfy_quant": marker_tensor({**fmt.marker, **marker}),
        "bias": torch.zeros(64),
    }
    return {f"{LAYER}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("name", OURS)
def test_disguise_changes_names_and_no_byte(name):
    fmt, before = formats.get(name), state(name)
    after = dict(before)
    assert stand_in.disguise(after) == {LAYER: fmt}
    host = formats.from_marker({"format": fmt.stand_in})
    assert host.native
    assert json.loads(bytes(after[f"{LAYER}.comfy_quant"].tolist()))["format"] == fmt.stand_in
    weight = after[f"{LAYER}.weight"]
    assert weight.dtype == host.storage
    assert weight.untyped_storage().data_ptr() == before[f"{LAYER}.weight"].data_ptr()
    changed = {f"{LAYER}.weight", f"{LAYER}.comfy_quant"}
    assert all(after[key] is before[key] for key in before if key not in changed)


@pytest.mark.parametrize("name", [n for n in formats.names() if formats.get(n).native])
def test_formats_of_the_host_pass_as_they_are(name):
    before = state(name)
    after = dict(before)
    assert stand_in.disguise(after) == {}
    assert all(after[key] is before[key] for key in before)


def test_packed_layer_that_asks_for_full_precision_is_refused_by_name():
    with pytest.raises(ValueError, match=rf"layer {LAYER}: full_precision.*not supported in mxfp4"):
        stand_in.disguise(state("mxfp4", full_precision_matrix_mult=True))
