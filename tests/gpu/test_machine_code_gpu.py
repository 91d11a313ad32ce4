"""Kernels from disk on the GPU: a later process compiles nothing and computes the same."""

import os
import subprocess
import sys

import pytest
import torch

from lowbit.ops.cuda import hopper

# Prints a digest of every result; the argument says whether it may compile.
RESULTS = """
import hashlib
import sys

import torch

from lowbit.ops.attention import attention
from lowbit.ops.cuda import nvrtc
from lowbit.ops.linear import linear
from lowbit.ops.quantize_rows import quantize_rows
from lowbit.ops.scaled_mm import scaled_mm
from lowbit.quant import formats

if sys.argv[1] == "later":
    del nvrtc.compile_source
generator = torch.Generator("cuda").manual_seed(0)
x = torch.randn(256, 512, generator=generator, device="cuda").bfloat16()
stored, scale = quantize_rows(x, torch.int8, True, "cuda")
product = scaled_mm(stored, stored, scale, scale, backend="hopper")
q = x.view(1, 256, 4, 128).transpose(1, 2)
out = attention(q, q, q, "exact", backend="hopper")
four = linear(x, formats.get("nvfp4").quantize(x), backend="w4a8")
for result in (stored, scale, product.float(), out.float(), four.float()):
    print(hashlib.sha256(result.cpu().numpy().tobytes()).hexdigest())
"""


def results(cache, when: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", RESULTS, when],
        env={**os.environ, "LOWBIT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_later_process_compiles_nothing(tmp_path):
    reason = hopper.missing(torch.device("cuda", 0))
    if reason:
        pytest.skip(reason)
    first = results(tmp_path, "first")
    assert len(first) == 5 and len(list((tmp_path / "nvrtc").iterdir())) >= 4
    assert results(tmp_path, "later") == first
