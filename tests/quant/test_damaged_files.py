"""What no writer meant to write is an error that names the file, whoever opens it."""

import json
import struct

import pytest
import torch

from lowbit.quant.checkpoint import CheckpointError
from lowbit.quant.convert_file import convert_file
from lowbit.quant.inspect_file import inspect_file
from lowbit.quant.model import load_model
from lowbit.quant.quantize_file import quantize_file

DEEP = "[" * 100_000
LAYER = "blocks.0.ffn.0"
F32 = ("F32", [2, 2], 16)
FP8 = ("F8_E4M3", [2, 2], 4)
# Name → (metadata, part of the layer → (dtype, shape, bytes), the error's words, the finding).
# Without a finding the header itself cannot be read.
DAMAGED = {
    "metadata nested too deep": (
        {"_quantization_metadata": DEEP},
        {"weight": F32},
        "_quantization_metadata is malformed",
        "marker_unreadable",
    ),
    "marker that is a number": (
        {},
        {"weight": FP8, "comfy_quant": ("F32", [], 4)},
        r"comfy_quant is float32 \[\], a marker is uint8",
        "marker_unreadable",
    ),
    "marker nested too deep": (
        {},
        {"weight": FP8, "comfy_quant": ("U8", [len(DEEP)], DEEP.encode())},
        "comfy_quant is malformed",
        "marker_unreadable",
    ),
    "FP8 weight of no dimension beside a scale of two": (
        {},
        {"weight": ("F8_E4M3", [], 1), "weight_scale": ("F32", [1, 1], 4)},
        rf"layer {LAYER}: a quantized weight is \[N, K\], this one \[\]",
        "payload_shape",
    ),
    "dimension of 64 bits": (
        {},
        {"weight": ("F32", [2**63, 0], 0)},
        rf"tensor {LAYER}\.weight has F32 .* more than torch can count",
        None,
    ),
}


@pytest.fixture(params=DAMAGED)
def damaged(request, tmp_path):
    """(path, the error's words, the finding's code or None)."""
    metadata, parts, words, code = DAMAGED[request.param]
    header, data = {"__metadata__": metadata}, b""
    for part, (dtype, shape, content) in parts.items():
        content = content if isinstance(content, bytes) else bytes(content)
        offsets = [len(data), len(data) + len(content)]
        header[f"{LAYER}.{part}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path, rf"damaged\.safetensors: .*{words}", code


def test_whoever_reads_the_layers_names_the_file(damaged, tmp_path):
    path, words, _ = damaged
    target = tmp_path / "target.safetensors"
    with pytest.raises(CheckpointError, match=words):
        convert_file(path, target)
    with pytest.raises(CheckpointError, match=words):
        quantize_file(path, target, "int8", recipe_name="none")
    for format_name in (None, "int8"):
        with pytest.raises(CheckpointError, match=words):
            load_model(path, torch.nn.Module(), format=format_name)
    assert not target.exists()


def test_inspection_finds_it(damaged):
    path, words, code = damaged
    if code is None:
        with pytest.raises(CheckpointError, match=words):
            inspect_file(str(path))
    else:
        assert code in {problem.code for problem in inspect_file(str(path)).errors}
