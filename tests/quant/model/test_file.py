"""Quantized models saved and loaded, and quantized while they are read."""

import json

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.ops.linear.modules import LowBitLinear
from lowbit.quant import formats
from lowbit.quant.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from lowbit.quant.model import file
from lowbit.quant.model.configuration import build
from lowbit.quant.quantize_file import quantize_file
from tests import gguf_files
from tests.quant.model.conftest import every_format, only_wan

FORMAT = "int8_convrot"
F32 = {"dtype": torch.float32}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def summary(records):
    return {r.name: (r.format, r.shape, r.error and f"{r.error:.4g}") for r in records}


@every_format
def test_model_saved_and_loaded_computes_the_same(model, run, path, name):
    done = lowbit.quantize_model(model, name)
    want = run(model)
    lowbit.save_model(model, path)
    loaded = lowbit.load_model(path, **F32)
    assert torch.equal(run(loaded), want)
    assert summary(lowbit.layer_records(loaded)) == summary(done.records)
    assert type(loaded) is type(model) and not loaded.training


def test_model_quantized_while_it_is_read_is_the_one_quantized_in_memory(model, run, tmp_path):
    model.save_pretrained(tmp_path / "dense", max_shard_size="2MB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    lowbit.quantize_model(model, FORMAT, keep=[r"\.1\."])
    seen = []
    loaded = lowbit.load_model(
        tmp_path / "dense",
        format=FORMAT,
        keep=[r"\.1\."],
        progress=lambda *at: seen.append(at),
        **F32,
    )
    assert torch.equal(run(loaded), run(model))
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_weights_are_not_made_before_they_are_read(model, path):
    lowbit.save_model(model, path)
    empty = build(Checkpoint(path))
    on_meta = sum(p.nbytes for p in empty.parameters() if p.is_meta)
    assert on_meta > 0.95 * sum(p.nbytes for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())


def test_file_bears_the_names_of_the_host_and_is_what_the_command_line_writes(
    small, model, path, tmp_path
):
    lowbit.quantize_model(model, FORMAT)
    dense = {n: t.clone() for n, t in model.state_dict().items() if type(t) is torch.Tensor}
    assert dense
    lowbit.save_model(model, path)
    found = lowbit.load_model(path, **F32)
    found.to("cpu")
    layer = {"wan": "blocks.0.self_attn.q"}.get(small.name, "transformer_blocks.0.attn.to_q")
    written = Checkpoint(path)
    assert {f"{layer}.{part}" for part in ("weight", "weight_scale", "comfy_quant", "bias")} <= set(
        written
    )
    assert json.loads(written.metadata["_lowbit"])["family"] == small.name


def test_file_of_the_command_line_loads(small, model, run, tmp_path, path):
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    quantize_file(tmp_path / "dense.safetensors", path, FORMAT)
    lowbit.quantize_model(model, FORMAT)
    want = run(model)
    with pytest.raises(ValueError, match="no configuration"):
        lowbit.load_model(path)
    assert torch.equal(run(lowbit.load_model(path, small.build(), **F32)), want)


def test_kept_in_float32_stays_so_and_the_rest_takes_the_dtype(small, model, run, path):
    lowbit.quantize_model(model, FORMAT)
    lowbit.save_model(model, path)
    loaded = lowbit.load_model(path)
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    if small.name == "wan":
        assert dtypes.pop("scale_shift_table") == torch.float32
    exact = type(loaded)._keep_in_fp32_modules or ()
    rest = {d for n, d in dtypes.items() if not set(n.split(".")) & set(exact)}
    assert rest == {torch.bfloat16}
    assert run(loaded, torch.bfloat16).dtype == torch.bfloat16


def test_undone_and_dense_models_are_saved_too(model, run, path):
    want = run(model)
    lowbit.save_model(model, path)
    assert torch.equal(run(lowbit.load_model(path, **F32)), want)


def first_layer(small) -> tuple[str, str]:
    """A layer's name as the host has it, and as the model has it."""
    name = "transformer_blocks.0.attn.to_q"
    return ("blocks.0.self_attn.q", "blocks.0.attn1.to_q") if small.name == "wan" else (name, name)


@pytest.mark.parametrize("format", [None, "fp8_e4m3"])
def test_layer_that_asks_for_full_precision_is_dequantized(small, model, path, tmp_path, format):
    lowbit.quantize_model(model, "fp8_e4m3")
    lowbit.save_model(model, path)
    tensors = load_file(path)
    layer, name = first_layer(small)
    marker = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    tensors[f"{layer}.comfy_quant"] = file.marker_tensor(marker)
    save_file(tensors, tmp_path / "full.safetensors")
    loaded = lowbit.load_model(tmp_path / "full.safetensors", small.build(), format=format)
    assert not isinstance(loaded.get_submodule(name), LowBitLinear)
    want = model.get_submodule(name).weight.dequantize().bfloat16()
    assert torch.equal(loaded.get_submodule(name).weight, want)
    others = [r for r in lowbit.layer_records(loaded) if r.format]
    assert others and all(r.format == "fp8_e4m3" and r.reason == "as stored" for r in others)


def smoothed(small, model, path, tmp_path) -> tuple[str, torch.Tensor]:
    """Write `model` in NVFP4, one layer with a smoothing; return its name and true weight."""
    lowbit.quantize_model(model, "nvfp4", recipe="none")
    lowbit.save_model(model, path)
    layer, name = first_layer(small)
    weight = model.get_submodule(name).weight.dequantize()
    scale = torch.linspace(0.5, 2, weight.shape[1])
    tensors = load_file(path) | {f"{layer}.pre_quant_scale": scale}
    save_file(tensors, tmp_path / "smoothed.safetensors")
    return name, weight * scale


def test_smoothed_layer_as_stored_is_refused(small, model, path, tmp_path):
    smoothed(small, model, path, tmp_path)
    with pytest.raises(CheckpointError, match=r"wants its input smoothed.*pass a format"):
        lowbit.load_model(tmp_path / "smoothed.safetensors", small.build())


@pytest.mark.parametrize("format", ["nvfp4", FORMAT])
def test_smoothing_is_folded_into_what_is_quantized_anew(small, model, path, tmp_path, format):
    """In the file's own format too: a copy of the numbers would lose it."""
    name, want = smoothed(small, model, path, tmp_path)
    loaded = lowbit.load_model(
        tmp_path / "smoothed.safetensors", small.build(), format=format, recipe="none", **F32
    )
    module = loaded.get_submodule(name)
    fmt = formats.of(module.weight)
    assert fmt.name == format
    error = (module.weight.dequantize() - want).norm() / want.norm()
    assert 0 < error < fmt.max_error
    assert module.record.error == pytest.approx(error.item(), rel=1e-3)
    copies = [r for r in lowbit.layer_records(loaded) if r.reason == "as stored"]
    assert bool(copies) is (format == "nvfp4") and name not in {r.name for r in copies}


def test_file_that_does_not_fit_is_refused_by_name(small, model, path, tmp_path):
    lowbit.save_model(model, path)
    tensors = load_file(path)
    name = sorted(n for n in tensors if n.endswith("bias"))[0]
    value = tensors.pop(name)
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=f"the file lacks .*{name}"):
        lowbit.load_model(tmp_path / "less.safetensors", small.build())
    save_file(tensors | {name: value[1:].clone()}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is "):
        lowbit.load_model(tmp_path / "other.safetensors", small.build())


def test_existing_file_is_not_replaced_unasked(model, path):
    lowbit.save_model(model, path)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        lowbit.save_model(model, path)
    lowbit.save_model(model, path, overwrite=True)
    with pytest.raises(CheckpointError, match="must end with"):
        lowbit.save_model(model, path.with_suffix(".bin"))


def test_gguf_is_quantized_while_it_is_read(small, model, path, tmp_path):
    """The file has what rounding to Q8_0 left; the same values from safetensors give the same."""
    lowbit.save_model(model, path)
    gguf_files.write(tmp_path / "model.gguf", load_file(path), "Q8_0")
    source = open_checkpoint(tmp_path / "model.gguf")
    save_file({name: source.read(name) for name in source}, tmp_path / "same.safetensors")
    got, want = (
        lowbit.load_model(tmp_path / name, small.build(), format=FORMAT, **F32)
        for name in ("model.gguf", "same.safetensors")
    )
    assert summary(lowbit.layer_records(got)) == summary(lowbit.layer_records(want))
    assert got.get_submodule(first_layer(small)[1]).record.format == FORMAT
    others = want.state_dict()
    for name, tensor in got.state_dict().items():
        if isinstance(tensor, QuantizedTensor):
            assert torch.equal(tensor.dequantize(), others[name].dequantize())
        else:
            # Blocks that are kept become bfloat16.
            assert torch.equal(tensor.bfloat16(), others[name].bfloat16())


def test_gguf_as_stored_is_refused(small, model, path, tmp_path):
    lowbit.save_model(model, path)
    gguf_files.write(tmp_path / "model.gguf", load_file(path), "Q8_0")
    with pytest.raises(CheckpointError, match=r"Q8_0 blocks .* choose a format"):
        lowbit.load_model(tmp_path / "model.gguf", small.build())


class Adapted(torch.nn.Module):
    """A layer with a LoRA beside it, its parts called as PEFT calls them."""

    def __init__(self, layer, rank=4):
        super().__init__()
        self.base_layer = layer
        first = torch.nn.Linear(layer.in_features, rank, bias=False)
        self.lora_A = torch.nn.ModuleDict({"default": first})
        self.lora_B = torch.nn.ModuleDict(
            {"default": torch.nn.Linear(rank, layer.out_features, bias=False)}
        )


@only_wan
def test_model_with_an_unmerged_lora_is_refused_before_anything_is_written(model, path, tmp_path):
    attention = model.blocks[1].attn1
    attention.to_q = Adapted(attention.to_q)
    message = r"^blocks\.1\.attn1\.to_q\.base_layer\.weight is no name .* take it off first"
    with pytest.raises(ValueError, match=message):
        lowbit.save_model(model, path)
    assert list(tmp_path.iterdir()) == []


@only_wan
def test_compiled_wrapper_is_refused_and_the_model_in_it_saved(model, run, path):
    compiled = torch.compile(model)
    with pytest.raises(ValueError, match=r"^_orig_mod\..*pass the model that was compiled"):
        lowbit.save_model(compiled, path)
    assert not path.exists()
    lowbit.save_model(compiled._orig_mod, path)
    assert torch.equal(run(lowbit.load_model(path, **F32)), run(model))
