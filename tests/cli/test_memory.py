"""Quantizing a file of 4 GB: how much memory the process takes, and how fast it is."""

import json
import subprocess
import sys

import pytest

from lowbit.quant.checkpoint.header import encode_header

WIDTH, FFN, BLOCKS = 5120, 13824, 6
FILE_BYTES = 4_000_000_000
ALLOWED_BYTES = 1_500_000_000
# The largest tensor as bfloat16, as float32 and quantized: it may lie in memory three times.
COPIES = 3
MEASURED = """
import resource, sys
from lowbit.cli import main

code = main(sys.argv[1:])
# Linux counts in kB.
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


def wan_shapes():
    """Linear layers of Wan 14B, as many blocks as make 4 GB, and what makes them a Wan."""
    shapes = {"head.modulation": (1, 2, WIDTH)}
    for i in range(BLOCKS):
        for attention in ("self_attn", "cross_attn"):
            shapes |= {f"blocks.{i}.{attention}.{x}.weight": (WIDTH, WIDTH) for x in "qkvo"}
        shapes[f"blocks.{i}.ffn.0.weight"] = (FFN, WIDTH)
        shapes[f"blocks.{i}.ffn.2.weight"] = (WIDTH, FFN)
    return shapes


def write(path):
    """Write the model in bfloat16, repeating the same random megabytes; return largest tensor."""
    import torch

    buffer = (torch.randn(1 << 23) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    entries, end = {}, 0
    for name, shape in wan_shapes().items():
        start, end = end, end + 2 * shape[-1] * shape[-2]
        entries[name] = (torch.bfloat16, shape, start, end)
    with open(path, "wb") as file:
        file.write(encode_header(entries, {}))
        for left in range(end, 0, -len(buffer)):
            file.write(buffer[: min(left, len(buffer))])
    assert end > FILE_BYTES
    return 2 * FFN * WIDTH


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["fp8_e4m3", "int8_convrot", "nvfp4"])
def test_memory_is_bounded_by_the_largest_tensor(tmp_path, format_name):
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    try:
        largest = write(source)
        command = [sys.executable, "-c", MEASURED, "quantize", str(source), str(target)]
        command += ["--format", format_name, "--device", "cpu", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, result = int(done.stderr.split()[-1]), json.loads(done.stdout)
    finally:
        source.unlink()
        target.unlink(missing_ok=True)
    speed = result["source_bytes_per_second"] / 1e6
    print(f"\n{format_name}: peak {peak / 1e6:.0f} MB, {speed:.0f} MB/s of source")
    assert peak < ALLOWED_BYTES + COPIES * largest
