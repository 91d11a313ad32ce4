import json
import os
import resource
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from lowbit.cli import quantize
from lowbit.quant import formats
from lowbit.quant.checkpoint import CheckpointWriter
from tests.cli import files
from tests.cli.forked import forked

OLD = b"what was there before"
SMALL_FILE_BYTES = 1 << 20


def quantize_command(source, target, *more):
    return ["quantize", str(source), str(target), "--format", "fp8_e4m3", *more]


def hang_while_writing():
    """Have this process tell on stdout when it is in the middle of writing, and wait."""
    add = CheckpointWriter.add

    def add_and_wait(self, name, tensor):
        add(self, name, tensor)
        if name.endswith("ffn.0.weight"):
            print("writing", flush=True)
            time.sleep(60)

    CheckpointWriter.add = add_and_wait


def only(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("format_name", formats.names())
def test_every_format_is_written_and_passes_inspection_by_lowbit(
    lowbit, lowbit_json, wan, tmp_path, format_name
):
    target = tmp_path / "out.safetensors"
    code, result = lowbit_json("quantize", wan, target, "--format", format_name)
    assert code == 0
    _, report = lowbit_json("inspect", target)
    assert report["formats"][format_name]["count"] == 10
    assert not [p for p in report["problems"] if "LowBit" in p["affects"]]
    assert result["mean_error"] < formats.get(format_name).max_error
    assert result["result_bytes"] < result["source_bytes"]


def test_format_names_of_help_are_those_of_the_registry():
    assert sorted(quantize.format_names()) == sorted(formats.names())


def test_summary_tells_formats_sizes_errors_reasons_and_speed(lowbit, wan, tmp_path):
    code, out, err = lowbit(*quantize_command(wan, tmp_path / "o.safetensors"))
    assert code == 0
    assert "fp8_e4m3  10 layers" in out
    assert "became" in out and "/s of source" in out
    assert "mean 2." in out and "blocks.0." in out
    assert "the head is never quantized: head.head" in out
    assert "100%" in err


def test_json_is_one_object_with_every_layer(lowbit_json, wan, tmp_path):
    code, result = lowbit_json(*quantize_command(wan, tmp_path / "o.safetensors"))
    assert code == 0
    assert result["family"] == "wan" and result["variant"] == "t2v"
    assert sum(layer["format"] == "fp8_e4m3" for layer in result["layers"]) == 10
    assert result["worst"][0]["error"] == max(r["error"] or 0 for r in result["layers"])


def test_keep_leaves_layers_and_says_so(lowbit, wan, tmp_path):
    target = tmp_path / "o.safetensors"
    code, out, _ = lowbit(*quantize_command(wan, target, "--keep", r"ffn\.0", "--keep", "attn.q"))
    assert code == 0
    assert "kept as asked: ffn\\.0: blocks.0.ffn.0" in out
    result = load_file(target)
    assert result["blocks.0.ffn.0.weight"].dtype == torch.bfloat16
    assert result["blocks.0.self_attn.q.weight"].dtype == torch.bfloat16
    assert result["blocks.0.ffn.2.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_sources_of_16_and_32_bits_are_read(lowbit_json, tensors, tmp_path, dtype):
    source = files.saved(tmp_path / "s.safetensors", {n: t.to(dtype) for n, t in tensors.items()})
    code, result = lowbit_json(*quantize_command(source, tmp_path / "o.safetensors"))
    assert code == 0 and result["mean_error"] < formats.get("fp8_e4m3").max_error


@pytest.mark.parametrize(
    "make",
    [
        files.legacy_fp8,
        lambda t: files.legacy_fp8(t, torch.bfloat16),
        lambda t: files.legacy_fp8(t, flag=False),
        lambda t: files.marked(t, "fp8_e4m3"),
        lambda t: files.marked(t, "int8_convrot"),
    ],
    ids=["scaled_fp8", "WanVideoWrapper", "no marking", "comfy_quant", "int8_convrot"],
)
def test_quantized_sources_are_dequantized_first(lowbit, lowbit_json, tensors, wan, tmp_path, make):
    source = files.saved(tmp_path / "s.safetensors", make(tensors))
    target = tmp_path / "o.safetensors"
    assert lowbit("quantize", source, target, "--format", "int8")[0] == 0
    _, compared = lowbit_json("compare", wan, target)
    # The error of FP8 and of a scale in bfloat16 remains, that of INT8 is added.
    allowed = formats.get("fp8_e4m3").max_error + formats.get("int8").max_error
    assert max(d["error"] for d in compared["differences"]) < allowed
    assert not compared["only_a"]


def test_diffusers_names_become_the_hosts(lowbit, lowbit_json, tensors, wan, tmp_path):
    source = files.saved(tmp_path / "s.safetensors", files.diffusers_named(tensors))
    target = tmp_path / "o.safetensors"
    assert lowbit(*quantize_command(source, target))[0] == 0
    _, compared = lowbit_json("compare", wan, target)
    assert not compared["only_a"] and not compared["only_b"]


def test_folder_of_shards_is_one_checkpoint(lowbit, lowbit_json, tensors, wan, tmp_path):
    source = files.sharded(tmp_path / "shards", tensors)
    target = tmp_path / "o.safetensors"
    assert lowbit(*quantize_command(source, target))[0] == 0
    _, compared = lowbit_json("compare", wan, target)
    assert not compared["only_a"] and not compared["only_b"]


def test_existing_target_is_replaced_only_when_asked(lowbit, wan, tmp_path):
    target = tmp_path / "o.safetensors"
    target.write_bytes(OLD)
    code, _, err = lowbit(*quantize_command(wan, target))
    assert code == 2 and "--overwrite" in err
    assert target.read_bytes() == OLD
    assert lowbit(*quantize_command(wan, target, "--overwrite"))[0] == 0
    assert target.read_bytes() != OLD


def test_source_is_never_overwritten(lowbit, tensors, tmp_path):
    source = files.saved(tmp_path / "s.safetensors", tensors)
    code, _, err = lowbit(*quantize_command(source, source, "--overwrite"))
    assert code == 2 and "same file" in err


def test_nan_names_the_layer_and_leaves_the_target(lowbit, tensors, tmp_path):
    bad = dict(tensors)
    bad["blocks.0.ffn.2.weight"] = bad["blocks.0.ffn.2.weight"].clone()
    bad["blocks.0.ffn.2.weight"][3, 5] = torch.nan
    source = files.saved(tmp_path / "s.safetensors", bad)
    target = tmp_path / "o.safetensors"
    target.write_bytes(OLD)
    code, _, err = lowbit(*quantize_command(source, target, "--overwrite"))
    assert code == 2
    assert "blocks.0.ffn.2" in err and "NaN" in err
    assert target.read_bytes() == OLD
    assert only(tmp_path) == ["o.safetensors", "s.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "fp9"], "unknown format 'fp9'; known are"),
        (["--format", "int8", "--recipe", "flux9"], "unknown recipe 'flux9'"),
        (["--format", "int8", "--keep", "("], "no regular expression"),
        (["--format", "int8", "--keep", "."], "nothing to quantize"),
        ([], "--format"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(lowbit, wan, tmp_path, options, message):
    code, out, err = lowbit("quantize", wan, tmp_path / "o.safetensors", *options)
    assert code == 2
    assert err.startswith("lowbit: ") and message in err and err.count("\n") == 1
    assert not out and only(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_cuda_without_gpu_is_an_error(lowbit, wan, tmp_path):
    code, _, err = lowbit(*quantize_command(wan, tmp_path / "o.safetensors", "--device", "cuda"))
    assert code == 2 and "--device cpu" in err


@pytest.mark.parametrize("before", [None, OLD], ids=["absent", "there"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
    ids=["SIGTERM", "SIGINT", "SIGKILL"],
)
def test_killed_while_writing_leaves_the_target_as_it_was(wan, tmp_path, number, code, before):
    target = tmp_path / "o.safetensors"
    if before:
        target.write_bytes(before)
    command = quantize_command(wan, target, "--overwrite", "--json")
    with forked(command, hang_while_writing) as (process, stdout, stderr):
        assert stdout.readline() == b"writing\n"
        os.kill(process.pid, number)
        out, err = stdout.read(), stderr.read()
    assert process.exitcode == code
    assert (target.read_bytes() if target.exists() else None) == before
    if number != signal.SIGKILL:
        assert only(tmp_path) == (["o.safetensors"] if before else [])
        assert err.decode().startswith(f"lowbit: stopped by {number.name}") and not out


@pytest.mark.parametrize("limit", [SMALL_FILE_BYTES, SMALL_FILE_BYTES // 64], ids=["1 MB", "16 kB"])
def test_full_disk_is_told_and_leaves_the_target(wan, tmp_path, limit):
    target = tmp_path / "o.safetensors"
    target.write_bytes(OLD)

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = quantize_command(wan, target, "--overwrite", "--json")
    with forked(command, limit_files) as (process, stdout, stderr):
        out, err = stdout.read(), stderr.read()
    assert process.exitcode == 2
    assert err.decode() == f"lowbit: {target}: File too large\n" and not out
    assert target.read_bytes() == OLD
    assert only(tmp_path) == ["o.safetensors"]


def test_result_opens_with_safetensors_and_tells_its_recipe(lowbit, wan, tmp_path):
    from safetensors import safe_open

    target = tmp_path / "o.safetensors"
    assert lowbit(*quantize_command(wan, target))[0] == 0
    with safe_open(target, "pt") as file:
        record = json.loads(file.metadata()["_lowbit"])
    assert record["format"] == "fp8_e4m3" and len(record["layers"]) == 10
