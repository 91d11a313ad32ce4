"""GGUF files through the commands: they are quantized, described and compared as any other."""

import pytest
import torch

from lowbit.quant import formats
from lowbit.quant.checkpoint import Checkpoint, open_checkpoint
from lowbit.quant.checkpoint.stored import logical_shapes, stored_layers
from tests import gguf_files
from tests.checkpoints import qwen_image_shapes

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


# Qwen-Image's widths, each made small enough for a test; rows of the patch are reshaped in GGUF.
NARROW = {3072: 256, 2 * 3072: 512, 6 * 3072: 1536, 4 * 3072: 1024, 3584: 512}

QWEN_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)


@pytest.fixture(scope="module")
def qwen_shapes() -> dict[str, tuple[int, ...]]:
    shapes = qwen_image_shapes(layers=2)
    return {name: tuple(NARROW.get(size, size) for size in shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def qwen(qwen_shapes, tmp_path_factory):
    """A narrow Qwen-Image in Q8_0, as the converter writes it, under the host's names."""
    noise = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(shape, generator=noise) for n, shape in qwen_shapes.items()}
    path = tmp_path_factory.mktemp("qwen") / "qwen.gguf"
    return gguf_files.write(path, tensors, "Q8_0", arch="qwen_image")


def test_qwen_image_as_gguf_has_its_names_and_shapes(lowbit, qwen, qwen_shapes):
    checkpoint = open_checkpoint(qwen)
    assert {name: info.shape for name, info in checkpoint.items()} == qwen_shapes
    assert checkpoint["img_in.weight"].encoding == "Q8_0"
    code, out, _ = lowbit("inspect", qwen)
    assert code == 0 and "Qwen-Image, t2i, 2 blocks" in out


def test_qwen_image_as_gguf_is_quantized_by_its_own_rules(lowbit_json, qwen, qwen_shapes, tmp_path):
    target = tmp_path / "nvfp4.safetensors"
    code, _ = lowbit_json("quantize", qwen, target, "--format", "nvfp4")
    assert code == 0
    found = stored_layers(checkpoint := Checkpoint(target))
    want = {}
    for block in ("transformer_blocks.0.", "transformer_blocks.1."):
        want |= dict.fromkeys((f"{block}attn.{layer}" for layer in QWEN_ATTENTION), "nvfp4")
        want |= {f"{block}{stream}_mlp.net.0.proj": "nvfp4" for stream in ("img", "txt")}
        want |= {f"{block}txt_mlp.net.2": "nvfp4", f"{block}img_mlp.net.2": "int8_convrot"}
    assert {name: layer.format.name for name, layer in found.items()} == want
    shapes = logical_shapes(checkpoint, found)
    assert {name: shapes[name] for name in qwen_shapes} == qwen_shapes


def test_gguf_is_not_converted_but_quantized(lowbit, tensors, tmp_path):
    source = gguf_files.write(tmp_path / "wan.gguf", tensors, "Q8_0")
    code, _, err = lowbit("convert", source, tmp_path / "target.safetensors")
    assert code == 2 and "`lowbit quantize` does that" in err
    assert "GGUF's Q8_0 blocks" in err and "no layer of it is quantized" not in err
    command = f"quantize {source} DST --format int8_convrot"
    assert f"`lowbit {command}`" in err
    target = tmp_path / "target.safetensors"
    assert lowbit(*command.replace("DST", str(target)).split())[0] == 0


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
