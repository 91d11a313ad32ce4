"""GGUF files through the commands: they are quantized, described and compared as any other."""

import pytest
import torch

from lowbit.quant import formats
from tests import gguf_files

# Relative RMS of a GGUF block's own rounding of a gaussian weight: a step of 2 · 4 σ / levels,
# over the square root of twelve.
BLOCK_ERROR = {"Q8_0": 0.01, "Q4_0": 0.15}


@pytest.mark.parametrize("kind", BLOCK_ERROR)
def test_gguf_becomes_every_kind_of_format(lowbit_json, tensors, wan, tmp_path, kind):
    source = gguf_files.write(tmp_path / "wan.gguf", tensors, kind)
    for name in ("int8_convrot", "nvfp4"):
        target = tmp_path / f"{name}.safetensors"
        code, result = lowbit_json("quantize", source, target, "--format", name)
        assert code == 0
        assert result["mean_error"] < formats.get(name).max_error
        code, report = lowbit_json("inspect", target)
        assert (code, report["formats"][name]["count"]) == (0, 10)
        assert report["formats"]["bfloat16"]["count"] == 6
        code, comparison = lowbit_json("compare", wan, target)
        worst = max(d["error"] for d in comparison["differences"])
        assert 0 < worst < formats.get(name).max_error + BLOCK_ERROR[kind]


def test_gguf_is_described_by_its_blocks(lowbit, tensors, tmp_path):
    source = gguf_files.write(tmp_path / "wan.gguf", tensors, "Q4_K")
    code, out, _ = lowbit("inspect", source)
    assert code == 0
    assert "Wan 2.1 / 2.2, t2v, 1 block" in out
    assert "Q4_K  16 layers" in out


def test_gguf_is_not_converted_but_quantized(lowbit, tensors, tmp_path):
    source = gguf_files.write(tmp_path / "wan.gguf", tensors, "Q8_0")
    code, _, err = lowbit("convert", source, tmp_path / "target.safetensors")
    assert code == 2 and "`lowbit quantize` does that" in err


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pth", ".bin", ".PT"])
def test_no_pickle_is_ever_loaded(lowbit, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"a": torch.zeros(1)}, path)
    for command in (
        ["inspect", path],
        ["quantize", path, tmp_path / "t.safetensors", "--format", "int8"],
        ["compare", path, path],
    ):
        code, _, err = lowbit(*command)
        assert code == 2 and "a pickle, which can run any code and is never loaded" in err
