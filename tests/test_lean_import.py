"""Importing the pack starts no GPU and needs nothing optional."""

import subprocess
import sys

OPTIONAL = ["PIL", "diffusers", "gguf", "matplotlib", "sageattention", "transformers", "triton"]

# torch and comfy-kitchen come first: what they import where it is installed is theirs.
CHECK = """
import importlib, sys
import torch, comfy_kitchen
before = set(sys.modules)
for name in {modules}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized(), "the GPU is initialised"
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert not new & set({optional}), f"imported: {{sorted(new & set({optional}))}}"
"""


def test_import_starts_no_gpu_and_needs_no_optional_package():
    modules = ["lowbit", "lowbit.quant.quantize_file", "lowbit.quant.model"]
    code = CHECK.format(modules=modules, optional=OPTIONAL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
